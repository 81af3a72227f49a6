using Vmm.Core.SaveVm;

namespace Vmm.Migration.Multifd;

/// <summary>How pages on the channels of multifd are compressed (QEMU: MultiFDCompression).</summary>
internal enum MultifdCompression
{
    /// <summary>Not at all.</summary>
    None,
    /// <summary>By zlib.</summary>
    Zlib,
    /// <summary>By zstd; needs the system's libzstd.</summary>
    Zstd,
}

/// <summary>The settings of multifd for one attempt; both sides need the same number of channels and the same compression.</summary>
/// <param name="Channels">Channels beside the main one, 1 to 255.</param>
/// <param name="Compression">How pages are compressed.</param>
/// <param name="Level">The compressor's level.</param>
/// <param name="DetectsZeroPages">The channels look for zero pages (QEMU: zero-page-detection=multifd).</param>
internal sealed record MultifdSettings(int Channels, MultifdCompression Compression = MultifdCompression.None, int Level = 1, bool DetectsZeroPages = false)
{
    /// <summary>The settings by parameters.</summary>
    internal static MultifdSettings Of(MigrationParameters parameters)
    {
        // Peers that need a SYNC after each section drop zero pages in packets without a word (stream 4.3).
        bool detects = parameters is { ZeroPageDetection: ZeroPageDetection.Multifd, MultifdFlushAfterEachSection: false };
        MultifdCompression compression = parameters.MultifdCompression switch { "zlib" => MultifdCompression.Zlib, "zstd" => MultifdCompression.Zstd, _ => MultifdCompression.None };
        int level = compression == MultifdCompression.Zlib ? parameters.MultifdZlibLevel : parameters.MultifdZstdLevel;
        return new MultifdSettings(parameters.MultifdChannels, compression, level, detects);
    }

    /// <summary>True when device state may go over the channels, too (QEMU: <c>multifd_device_state_supported</c>).</summary>
    internal bool CarriesState => Compression == MultifdCompression.None;

    /// <summary>The bits of the method in a packet's flags.</summary>
    internal MultifdFlags Method => Compression switch
    {
        MultifdCompression.Zlib => MultifdFlags.Zlib,
        MultifdCompression.Zstd => MultifdFlags.Zstd,
        _ => MultifdFlags.None,
    };
}
