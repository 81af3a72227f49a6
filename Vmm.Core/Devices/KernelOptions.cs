namespace Vmm.Core.Devices;

/// <summary>The program that a guest starts with.</summary>
public sealed record KernelOptions
{
    /// <summary>A flat binary, an ELF file or a Linux bzImage.</summary>
    public required string KernelPath { get; init; }

    /// <summary>The file's content when it is not to be read from <see cref="KernelPath"/>, which is then only its name.</summary>
    public ReadOnlyMemory<byte>? Image { get; init; }

    /// <summary>Linux initial RAM disk, or null.</summary>
    public string? InitrdPath { get; init; }

    /// <summary>Command line.</summary>
    public string CommandLine { get; init; } = "";
}
