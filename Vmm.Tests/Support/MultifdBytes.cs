using Vmm.Core.Memory;
using Vmm.Migration.Multifd;

namespace Vmm.Tests.Support;

/// <summary>Packets of multifd as bytes.</summary>
internal static class MultifdBytes
{
    internal static MultifdSettings One { get; } = new(1);

    internal static byte[] Sync(ulong number) => Made(MultifdPacket.HeaderBytes, b => MultifdPacket.WriteSync(b, number));

    internal static byte[] Pages(RamBlock block, long[] pages, ulong number, long[]? zero = null) =>
        Made(MultifdPacket.HeaderBytes, b => MultifdPacket.WritePages(b, block, pages, zero, MultifdFlags.None, pages.Length * RamBlock.PageSize, number));

    internal static byte[] Compressed(RamBlock block, long[] pages, ulong number, MultifdFlags method, int payloadBytes) =>
        Made(MultifdPacket.HeaderBytes, b => MultifdPacket.WritePages(b, block, pages, [], method, payloadBytes, number));

    internal static byte[] State(string idStr, int instance, int lengthBytes) =>
        Made(MultifdPacket.StateHeaderBytes, b => MultifdPacket.WriteState(b, idStr, instance, lengthBytes));

    private static byte[] Made(int bytes, Action<byte[]> write)
    {
        byte[] made = new byte[bytes];
        write(made);
        return made;
    }
}
