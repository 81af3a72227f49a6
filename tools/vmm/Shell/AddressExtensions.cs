using System.Text.Json.Nodes;
using Vmm.Migration.Channels;

namespace Vmm.Tools.Cli.Shell;

/// <summary>Conversions of addresses for the command line.</summary>
internal static class AddressExtensions
{
    /// <summary>Makes a path absolute: it is relative to the directory of the command, not of the VM's process.</summary>
    public static MigrationAddress Rooted(this MigrationAddress address) =>
        address.Transport is MigrationTransport.File or MigrationTransport.Unix ? address with { Path = Path.GetFullPath(address.Path) } : address;

    /// <summary>Returns the URI to which a source must migrate.</summary>
    public static MigrationAddress ToUri(this MigrationSocketAddress address) => address.Type == "unix"
        ? new() { Transport = MigrationTransport.Unix, Path = address.Path ?? string.Empty }
        : new() { Transport = MigrationTransport.Tcp, Host = address.Host ?? string.Empty, Port = address.Port ?? 0 };

    /// <summary>Reads a QMP SocketAddress.</summary>
    public static MigrationSocketAddress ReadSocketAddress(JsonNode? address) =>
        new(address.Text("type") ?? "inet", address.Text("host"), int.TryParse(address?["port"]?.ToString(), out int port) ? port : null, address.Text("path"));
}
