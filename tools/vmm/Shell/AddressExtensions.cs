using System.Text.Json.Nodes;
using Vmm.Migration.Channels;

namespace Vmm.Tools.Cli.Shell;

/// <summary>Conversions of addresses for the command line.</summary>
internal static class AddressExtensions
{
    /// <summary>Makes a path absolute: it is relative to the directory of the command, not of the VM's process.</summary>
    public static MigrationAddress Rooted(this MigrationAddress address) =>
        address.Transport is MigrationTransport.File or MigrationTransport.Unix ? address with { Path = Path.GetFullPath(address.Path) } : address;

    /// <summary>Reads a QMP SocketAddress; what comes back reaches the one who listens there.</summary>
    public static MigrationAddress ReadSocketAddress(JsonNode? address) => address.Text("type") == "unix"
        ? new() { Transport = MigrationTransport.Unix, Path = address.Text("path") ?? string.Empty }
        : new() { Transport = MigrationTransport.Tcp, Host = address.Text("host") ?? string.Empty, Port = int.TryParse(address?["port"]?.ToString(), out int port) ? port : 0 };
}
