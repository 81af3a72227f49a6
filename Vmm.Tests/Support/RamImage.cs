using Vmm.Migration.Viewer;


namespace Vmm.Tests.Support;

/// <summary>Receives the RAM that the viewer rebuilds from a stream.</summary>
internal sealed class RamImage : IRamContentSink
{
    internal Dictionary<string, byte[]> Blocks { get; } = [];

    public void AddBlock(string block, ulong usedLength) => Blocks[block] = new byte[usedLength];

    public Span<byte> Page(string block, ulong offset, int length) => Blocks[block].AsSpan((int)offset, length);
}
