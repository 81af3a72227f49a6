namespace Vmm.Migration.Channels;

/// <summary>A listening address (QEMU: SocketAddress).</summary>
/// <param name="Type"><c>inet</c> or <c>unix</c>.</param>
/// <param name="Host">Host of an inet address.</param>
/// <param name="Port">Port of an inet address.</param>
/// <param name="Path">Path of a UNIX address.</param>
public sealed record MigrationSocketAddress(string Type, string? Host, int? Port, string? Path);
