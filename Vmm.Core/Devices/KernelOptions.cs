namespace Vmm.Core.Devices;

/// <summary>The program that a guest starts with.</summary>
public sealed record KernelOptions
{
    /// <summary>Path of a flat binary, an ELF file or a Linux bzImage.</summary>
    public required string KernelPath { get; init; }

    /// <summary>Content of the file, if it must not be read from <see cref="KernelPath"/>, which then only names it; null to read the file.</summary>
    public ReadOnlyMemory<byte>? Image { get; init; }

    /// <summary>Path of Linux's initial RAM disk, or null.</summary>
    public string? InitrdPath { get; init; }

    /// <summary>The kernel's command line.</summary>
    public string CommandLine { get; init; } = "";
}
