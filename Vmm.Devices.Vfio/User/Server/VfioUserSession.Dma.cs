using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Devices.Vfio.User.Wire;

namespace Vmm.Devices.Vfio.User.Server;

internal sealed partial class VfioUserSession
{
    /// <summary>DMA_MAP (vfio-user 3.8); the reply is a bare header.</summary>
    private Errno DmaMapCommand(ReadOnlySpan<byte> body)
    {
        if (!VfioUserDmaMap.TryRead(body, out VfioUserDmaMap request) || request.ArgSz < VfioUserDmaMap.Length || _fds.Count > 1) return Errno.EINVAL;
        if (!Quiesce()) return Errno.EIO;
        try
        {
            OwnedFd? fd = _fds.Count == 1 ? _fds[0] : null;
            _fds.Clear();
            return _device.Dma.Map(request, fd);
        }
        finally
        {
            _backend.Unquiesce();
        }
    }

    /// <summary>DMA_UNMAP (vfio-user 3.9): the reply repeats the request's 24 bytes, and with flag 1 adds the bitmap's head (16 bytes) and the bitmap.</summary>
    private Errno DmaUnmapCommand(ReadOnlySpan<byte> body)
    {
        if (!VfioUserDmaUnmap.TryRead(body, out VfioUserDmaUnmap request) || request.ArgSz is < VfioUserDmaUnmap.Length or > VfioUserLimits.ArgSizeBytes) return Errno.EINVAL;
        VfioUserBitmap bitmap = default;
        switch (request.Flags)
        {
            case 0:
                break;
            case VfioUserDmaUnmap.FlagAll:
                if ((request.Address | request.Size) != 0) return Errno.EINVAL;
                break;
            case VfioUserDmaUnmap.FlagGetDirty:
                const int head = VfioUserDmaUnmap.Length + VfioUserBitmap.Length;
                if (!VfioUserBitmap.TryRead(body[VfioUserDmaUnmap.Length..], out bitmap) || !_device.Dma.IsLogging || !IsBitmap(bitmap, request.Size)
                    || request.ArgSz < head + bitmap.Bytes) return Errno.EINVAL;
                break;
            default:
                return Errno.EINVAL;
        }
        if (!Quiesce()) return Errno.EIO;
        try
        {
            return Unmap(request, bitmap, body);
        }
        finally
        {
            _backend.Unquiesce();
        }
    }

    private Errno Unmap(in VfioUserDmaUnmap request, VfioUserBitmap bitmap, ReadOnlySpan<byte> body)
    {
        int head = VfioUserDmaUnmap.Length + (bitmap.Bytes > 0 ? VfioUserBitmap.Length : 0);
        Span<byte> payload = Payload(head + (int)bitmap.Bytes);
        body[..head].CopyTo(payload);
        Span<byte> bits = payload[head..];
        bits.Clear();
        if (request.Flags != VfioUserDmaUnmap.FlagAll) return _device.Dma.Unmap(request.Address, request.Size, bitmap.PageSize, bits);
        _device.Dma.Clear();
        return Errno.None;
    }

    /// <summary>Whether a bitmap has the size that its range needs, within the limit of a reply (vfio-user S-26).</summary>
    private bool IsBitmap(in VfioUserBitmap bitmap, ulong lengthBytes) =>
        ulong.IsPow2(bitmap.PageSize) && lengthBytes > 0 && bitmap.Bytes <= (ulong)_device.Options.MaxDataXferBytes
        && bitmap.Bytes == VfioUserBitmap.BytesFor(lengthBytes, bitmap.PageSize);

    /// <summary>DIRTY_PAGES of protocol v1 (vfio-user 9), over the same log; the page size is VERSION's.</summary>
    private Errno DirtyPages(ReadOnlySpan<byte> body)
    {
        if (!_device.Options.LegacyMigrationRegion || !VfioUserDirtyPages.TryRead(body, out VfioUserDirtyPages request) || request.ArgSz < VfioUserDirtyPages.Length) return Errno.EINVAL;
        switch (request.Flags)
        {
            case VfioUserDirtyPages.Start:
                return _device.Dma.StartLog(VfioUserLimits.PageBytes);
            case VfioUserDirtyPages.Stop:
                _device.Dma.StopLog();
                return Errno.None;
            case VfioUserDirtyPages.Get:
                break;
            default:
                return Errno.EINVAL;
        }
        if (!VfioUserDirtyRange.TryRead(body[VfioUserDirtyPages.Length..], out VfioUserDirtyRange range) || !IsBitmap(range.Bitmap, range.Size)) return Errno.EINVAL;
        const int head = VfioUserDirtyPages.Length + VfioUserDirtyRange.Length;
        uint needed = head + (uint)range.Bitmap.Bytes;
        if (request.ArgSz < needed)
        {
            new VfioUserDirtyPages(needed, request.Flags).Write(Payload(VfioUserDirtyPages.Length));
            return Errno.None;
        }
        Span<byte> payload = Payload((int)needed);
        body[..head].CopyTo(payload);
        return _device.Dma.Report(range.Iova, range.Size, range.Bitmap.PageSize, payload[head..]);
    }
}
