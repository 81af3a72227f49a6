using System.Globalization;
using Vmm.Core.Devices;
using Vmm.Core.Errors;

namespace Vmm.Migration.Channels;

/// <summary>Kinds of migration address (QEMU: MigrationAddressType and SocketAddressType).</summary>
public enum MigrationTransport
{
    /// <summary><c>tcp:host:port</c>.</summary>
    Tcp,
    /// <summary><c>unix:path</c>.</summary>
    Unix,
    /// <summary><c>fd:name</c> or <c>fd:number</c>.</summary>
    Fd,
    /// <summary><c>exec:command</c>.</summary>
    Exec,
    /// <summary><c>file:path[,offset=N]</c>.</summary>
    File,
}

/// <summary>A parsed migration URI or QMP channel address (stream 14.1, qmp 8.2). Immutable.</summary>
public sealed record MigrationAddress
{
    /// <summary>Kind of address.</summary>
    public required MigrationTransport Transport { get; init; }
    /// <summary>TCP host; empty listens on all addresses.</summary>
    public string Host { get; init; } = string.Empty;
    /// <summary>TCP port; 0 lets the incoming side choose a free port.</summary>
    public int Port { get; init; }
    /// <summary>Last port to try when listening, inclusive (<c>to=</c>), or null.</summary>
    public int? ToPort { get; init; }
    /// <summary>Whether IPv4 may be used; null uses what the host name resolves to.</summary>
    public bool? IPv4 { get; init; }
    /// <summary>Whether IPv6 may be used; null uses what the host name resolves to.</summary>
    public bool? IPv6 { get; init; }
    /// <summary>QEMU's option <c>keep-alive</c>. It changes nothing here: every TCP peer is probed, because each wait has a deadline.</summary>
    public bool KeepAlive { get; init; }
    /// <summary>UNIX socket path, file path or descriptor name.</summary>
    public string Path { get; init; } = string.Empty;
    /// <summary>File offset in bytes.</summary>
    public long OffsetBytes { get; init; }
    /// <summary>Program and arguments; a URI runs through <c>/bin/sh -c</c>.</summary>
    public IReadOnlyList<string> Arguments { get; init; } = [];

    /// <summary>True for sockets, on which the peer can write back.</summary>
    public bool IsSocket => Transport is MigrationTransport.Tcp or MigrationTransport.Unix;

    /// <summary>Parses a URI.</summary>
    /// <param name="uri">E.g. <c>tcp:127.0.0.1:4444</c>.</param>
    /// <returns>The address.</returns>
    /// <exception cref="ConfigurationException">The URI is malformed or unknown. The text is QEMU's, if QEMU has one.</exception>
    public static MigrationAddress Parse(string uri)
    {
        ArgumentNullException.ThrowIfNull(uri);
        int at = uri.IndexOf(':', StringComparison.Ordinal);
        string rest = at < 0 ? string.Empty : uri[(at + 1)..];
        return (at < 0 ? string.Empty : uri[..at]) switch
        {
            "tcp" => ParseTcp(rest),
            "unix" => new() { Transport = MigrationTransport.Unix, Path = NotEmpty(rest, uri, "a path") },
            "fd" => new() { Transport = MigrationTransport.Fd, Path = NotEmpty(rest, uri, "a descriptor name or number") },
            "exec" => new() { Transport = MigrationTransport.Exec, Arguments = ["/bin/sh", "-c", NotEmpty(rest, uri, "a command")] },
            "file" => ParseFile(rest, uri),
            "vsock" or "rdma" => throw new ConfigurationException($"{uri[..at]}: migration is not implemented in this version of vmm"),
            _ => throw new ConfigurationException($"unknown migration protocol: {uri}") { Hint = "known: tcp:, unix:, fd:, exec:, file:" },
        };
    }

    /// <inheritdoc/>
    public override string ToString() => Transport switch
    {
        MigrationTransport.Tcp => $"tcp:{(Host.Contains(':', StringComparison.Ordinal) ? $"[{Host}]" : Host)}:{Port}",
        MigrationTransport.Unix => $"unix:{Path}",
        MigrationTransport.Fd => $"fd:{Path}",
        MigrationTransport.Exec => $"exec:{(Arguments is ["/bin/sh", "-c", var command] ? command : string.Join(' ', Arguments))}",
        _ => OffsetBytes == 0 ? $"file:{Path}" : $"file:{Path},offset=0x{OffsetBytes:x}",
    };

    private static MigrationAddress ParseTcp(string text)
    {
        string[] parts = OptionList.Split(text);
        int colon = parts[0].LastIndexOf(':');
        if (colon < 0) throw new ConfigurationException($"error parsing address '{text}'") { Hint = "tcp:HOST:PORT" };
        string host = parts[0][..colon];
        if (host.StartsWith('[') && host.EndsWith(']')) host = host[1..^1];
        else if (host.Contains(':', StringComparison.Ordinal)) throw new ConfigurationException($"error parsing address '{text}'") { Hint = "an IPv6 address needs brackets" };
        var address = new MigrationAddress { Transport = MigrationTransport.Tcp, Host = host, Port = ParsePort(parts[0][(colon + 1)..], text) };
        foreach (string part in parts.Skip(1))
        {
            (string key, string value) = part.Contains('=', StringComparison.Ordinal) ? OptionList.Pair(part, $"tcp:{text}") : new(part, "on");
            address = key switch
            {
                "to" => address with { ToPort = ParsePort(value, text) },
                "ipv4" => address with { IPv4 = OptionList.Bool(value, "tcp: option 'ipv4'") },
                "ipv6" => address with { IPv6 = OptionList.Bool(value, "tcp: option 'ipv6'") },
                "keep-alive" => address with { KeepAlive = OptionList.Bool(value, "tcp: option 'keep-alive'") },
                _ => throw new ConfigurationException($"tcp:{text}: unknown option '{key}'"),
            };
        }
        return address;
    }

    private static int ParsePort(string text, string address) =>
        int.TryParse(text, NumberStyles.None, CultureInfo.InvariantCulture, out int port) && port <= 65535
            ? port
            : throw new ConfigurationException($"error parsing port in address '{address}': '{text}' is not a number from 0 to 65535");

    private static MigrationAddress ParseFile(string text, string uri)
    {
        int at = text.LastIndexOf(",offset=", StringComparison.Ordinal);
        string path = at < 0 ? text : text[..at];
        ulong offset = at < 0 ? 0 : OptionList.SizeBytes(text[(at + 8)..], "file: option 'offset'");
        if (offset > long.MaxValue) throw new ConfigurationException($"file: option 'offset' is over {long.MaxValue}");
        return new() { Transport = MigrationTransport.File, Path = NotEmpty(path, uri, "a path"), OffsetBytes = (long)offset };
    }

    private static string NotEmpty(string text, string uri, string what) =>
        text.Length > 0 ? text : throw new ConfigurationException($"migration address '{uri}' lacks {what}");
}
