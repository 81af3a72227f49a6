namespace Vmm.Migration.Viewer;

/// <summary>What the viewer keeps of a stream.</summary>
internal sealed record StreamViewOptions
{
    /// <summary>True keeps every page record, up to <see cref="Core.Wire.WireLimits.ViewerPages"/>.</summary>
    public bool ListPages { get; init; }

    /// <summary>File offset at which the stream starts; null finds it after leading zero bytes.</summary>
    public long? StartOffset { get; init; }

    /// <summary>Receives RAM content, or null.</summary>
    internal IRamContentSink? Ram { get; init; }
}

/// <summary>Rebuilds RAM from a stream.</summary>
internal interface IRamContentSink
{
    /// <summary>Called for each block of the setup record, before its pages.</summary>
    /// <param name="block">Name of the block.</param>
    /// <param name="usedLength">Used length in bytes.</param>
    void AddBlock(string block, ulong usedLength);

    /// <summary>Returns the memory of one page, into which the viewer writes the new content. It must hold the page's former content, zeros at first.</summary>
    /// <param name="block">Name of the block.</param>
    /// <param name="offset">Offset in the block, bytes; the page is inside the block.</param>
    /// <param name="length">Size of a page in bytes.</param>
    /// <returns>The page, or empty to skip it.</returns>
    Span<byte> Page(string block, ulong offset, int length);
}
