namespace Vmm.Migration.Viewer;

/// <summary>What to keep of a stream.</summary>
public sealed record StreamViewOptions
{
    /// <summary>Keep every page record, up to <see cref="Core.Wire.WireLimits.ViewerPages"/>.</summary>
    public bool ListPages { get; init; }

    /// <summary>File offset at which the stream starts; null finds it after leading zero bytes.</summary>
    public long? StartOffset { get; init; }

    /// <summary>Receives RAM content, or null.</summary>
    internal IRamContentSink? Ram { get; init; }
}

/// <summary>Rebuilds RAM from a stream.</summary>
internal interface IRamContentSink
{
    /// <summary>A block of the setup record; comes before its pages.</summary>
    /// <param name="block">Block name.</param>
    /// <param name="usedLength">Bytes.</param>
    void AddBlock(string block, ulong usedLength);

    /// <summary>Memory of one page, as it is so far; the viewer writes the new content into it. Zero at first.</summary>
    /// <param name="block">Block name.</param>
    /// <param name="offset">Offset in the block; the page is inside the block.</param>
    /// <param name="length">Bytes of a page.</param>
    /// <returns>The page, or empty to skip it.</returns>
    Span<byte> Page(string block, ulong offset, int length);
}
