using System.Text;
using Vmm.Core.Errors;
using Vmm.Devices.Vfio.User.Wire;

namespace Vmm.Devices.Vfio.User.Backend;

/// <summary>
/// A resuming session that parses the framing of <see cref="VfioUserStateWriter"/>. The bytes may be split anywhere; every bound is checked before
/// data are kept (vfio-user S-40, S-41, S-55, S-56). Session's thread.
/// </summary>
/// <param name="typeName">Device type; a state of another type is refused with EINVAL.</param>
/// <param name="limitBytes">Most bytes of sections that the device takes, and of any one preview; more is refused with EFBIG.</param>
/// <param name="sink">Receives the sections for the device.</param>
public sealed class VfioUserStateReader(string typeName, ulong limitBytes, IVfioUserStateSink sink) : IVfioUserLoad
{
    private const int MaxHeaderBytes = VfioUserStateFormat.HeaderFixedBytes + VfioUserLimits.TypeNameBytes;

    private readonly byte[] _small = new byte[VfioUserStateFormat.HeadBytes + MaxHeaderBytes];
    private int _have, _want = VfioUserStateFormat.HeadBytes;
    private uint _kind, _argument;
    private ulong _length, _at, _total;
    private uint _crc;
    private bool _hasHeader, _isFull, _isComplete;

    /// <inheritdoc/>
    public Errno WriteState(ReadOnlySpan<byte> source)
    {
        while (source.Length > 0)
        {
            if (_isComplete) return Errno.EINVAL;
            Errno errno = _kind is VfioUserStateFormat.Section or VfioUserStateFormat.Preview ? TakeData(ref source) : TakeSmall(ref source);
            if (errno != Errno.None) return errno;
        }
        return Errno.None;
    }

    /// <inheritdoc/>
    public ValueTask<Errno> Commit() => _isComplete ? sink.Commit() : ValueTask.FromResult(Errno.EINVAL);

    /// <inheritdoc/>
    public void Dispose()
    {
    }

    private Errno TakeSmall(ref ReadOnlySpan<byte> source)
    {
        int n = Math.Min(source.Length, _want - _have);
        source[..n].CopyTo(_small.AsSpan(_have));
        source = source[n..];
        _have += n;
        if (_have < _want) return Errno.None;
        return _kind == VfioUserStateFormat.Header ? EndHeader() : EndHead();
    }

    private Errno EndHead()
    {
        _kind = LittleEndian.U32(_small, 0);
        _argument = LittleEndian.U32(_small, 4);
        _length = LittleEndian.U64(_small, 8);
        _at = 0;
        switch (_kind)
        {
            case VfioUserStateFormat.Header:
                if (_argument != VfioUserStateFormat.Version || _length is <= VfioUserStateFormat.HeaderFixedBytes or > MaxHeaderBytes) return Errno.EINVAL;
                _want = VfioUserStateFormat.HeadBytes + (int)_length;
                return Errno.None;
            case VfioUserStateFormat.Section or VfioUserStateFormat.Preview:
                bool isSection = _kind == VfioUserStateFormat.Section;
                if (!_hasHeader || isSection != _isFull) return Errno.EINVAL;
                // A preview is dropped, so it does not count towards the total; but no single one may exceed the limit.
                if (_length > limitBytes - (isSection ? _total : 0)) return Errno.EFBIG;
                if (!isSection) break;
                _total += _length;
                _crc = Crc32C.Append(_crc, _small.AsSpan(0, VfioUserStateFormat.HeadBytes));
                Errno errno = sink.BeginSection(_argument, _length);
                if (errno != Errno.None) return errno;
                break;
            case VfioUserStateFormat.End:
                if (!_isFull || _length != 0 || _argument != ~_crc) return Errno.EINVAL;
                _isComplete = true;
                break;
            default:
                return Errno.EINVAL;
        }
        if (_length == 0) NextRecord();
        return Errno.None;
    }

    private Errno EndHeader()
    {
        ReadOnlySpan<byte> header = _small.AsSpan(VfioUserStateFormat.HeadBytes, (int)_length);
        uint flags = LittleEndian.U32(header, 0);
        if ((flags & ~VfioUserStateFormat.FullSnapshot) != 0 || LittleEndian.U32(header, 4) != 0) return Errno.EINVAL;
        if (Encoding.ASCII.GetString(header[VfioUserStateFormat.HeaderFixedBytes..]) != typeName) return Errno.EINVAL;
        if (LittleEndian.U64(header, 8) > limitBytes) return Errno.EFBIG;
        (_hasHeader, _isFull, _total) = (true, (flags & VfioUserStateFormat.FullSnapshot) != 0, 0);
        _crc = Crc32C.Append(Crc32C.Initial, _small.AsSpan(0, _want));
        if (_isFull) sink.BeginSnapshot();
        NextRecord();
        return Errno.None;
    }

    private Errno TakeData(ref ReadOnlySpan<byte> source)
    {
        int n = (int)Math.Min((ulong)source.Length, _length - _at);
        ReadOnlySpan<byte> part = source[..n];
        source = source[n..];
        if (_kind == VfioUserStateFormat.Section)
        {
            _crc = Crc32C.Append(_crc, part);
            Errno errno = sink.SectionData(_argument, _at, part);
            if (errno != Errno.None) return errno;
        }
        _at += (uint)n;
        if (_at == _length) NextRecord();
        return Errno.None;
    }

    private void NextRecord() => (_kind, _have, _want) = (0, 0, VfioUserStateFormat.HeadBytes);
}
