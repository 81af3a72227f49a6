using System.Text.Json.Nodes;
using Vmm.Migration.Channels;

namespace Vmm.Tools.Cli.Shell;

/// <summary>Addresses as a user of a shell means them.</summary>
internal static class AddressExtensions
{
    /// <summary>Relative paths are relative to the directory of the command that names them, not to that of the VM.</summary>
    public static MigrationAddress Rooted(this MigrationAddress address) =>
        address.Transport is MigrationTransport.File or MigrationTransport.Unix ? address with { Path = Path.GetFullPath(address.Path) } : address;

    /// <summary>The URI that reaches a listening address.</summary>
    public static MigrationAddress ToUri(this MigrationSocketAddress address) => address.Type == "unix"
        ? new() { Transport = MigrationTransport.Unix, Path = address.Path ?? string.Empty }
        : new() { Transport = MigrationTransport.Tcp, Host = address.Host ?? string.Empty, Port = address.Port ?? 0 };

    /// <summary>Reads a QMP SocketAddress.</summary>
    public static MigrationSocketAddress ReadSocketAddress(JsonNode? address) =>
        new(address.Text("type") ?? "inet", address.Text("host"), int.TryParse(address?["port"]?.ToString(), out int port) ? port : null, address.Text("path"));
}
