using Vmm.Core.Errors;

namespace Vmm.Devices.Vfio.User.Backend;

/// <summary>
/// A saving session that frames a device's sections (see <see cref="VfioUserStateFormat"/>). While the device runs it gives previews, in
/// whole records; after the stop, the full snapshot. Session's thread, which also calls the delegates.
/// </summary>
public sealed class VfioUserStateWriter : IVfioUserSave
{
    private readonly string _typeName;
    private readonly ulong _limitBytes;
    private readonly Func<IEnumerable<VfioUserStateSection>> _snapshot;
    private readonly Func<int, VfioUserStateSection?>? _preview;
    private IEnumerator<VfioUserStateSection>? _sections;
    private VfioUserStateSection? _section;
    private ulong _sectionAt;
    /// <summary>Bytes of a head, header or end record that is being sent.</summary>
    private byte[] _record = [];
    private int _recordAt;
    private uint _crc;
    private bool _isStopped, _isEnded;

    /// <summary>Opens the session.</summary>
    /// <param name="typeName">Device type, which the header carries; 1 to 64 ASCII characters.</param>
    /// <param name="limitBytes">Most bytes of sections, which the header carries; a reader refuses more.</param>
    /// <param name="isStopped">Whether the device is stopped already.</param>
    /// <param name="snapshot">The sections of the stopped device; called once, at the first read after the stop.</param>
    /// <param name="preview">Gives a section of at most the given bytes while the device runs, or null when there is nothing new.</param>
    public VfioUserStateWriter(string typeName, ulong limitBytes, bool isStopped, Func<IEnumerable<VfioUserStateSection>> snapshot, Func<int, VfioUserStateSection?>? preview = null)
    {
        (_typeName, _limitBytes, _snapshot, _preview) = (typeName, limitBytes, snapshot, preview);
        if (isStopped) StopCopy();
        else Begin(isFull: false);
    }

    /// <inheritdoc/>
    public void StopCopy()
    {
        _isStopped = true;
        Begin(isFull: true);
    }

    /// <inheritdoc/>
    public int ReadState(Span<byte> destination, out Errno errno)
    {
        errno = Errno.None;
        // Previews are whole records, so the snapshot begins at a record; a reader without the previews can then begin there too (vfio-user S-37).
        if (!_isStopped && _recordAt == 0 && destination.Length < _record.Length) return 0;
        int have = Take(destination);
        return have > 0 ? have : _isStopped ? ReadSnapshot(destination) : ReadPreview(destination);
    }

    /// <inheritdoc/>
    public bool TryTake(int count, out ReadOnlyMemory<byte> bytes)
    {
        bytes = default;
        if (!_isStopped || _recordAt < _record.Length || _section?.Memory is null || _section.LengthBytes - _sectionAt < (uint)count) return false;
        ReadOnlyMemory<byte> rest = _section.Memory(_sectionAt);
        if (rest.Length < count) return false;
        bytes = rest[..count];
        _crc = Crc32C.Append(_crc, bytes.Span);
        _sectionAt += (uint)count;
        return true;
    }

    /// <inheritdoc/>
    public void Dispose() => _sections?.Dispose();

    private void Begin(bool isFull)
    {
        _record = VfioUserStateFormat.HeaderRecord(_typeName, _limitBytes, isFull);
        _recordAt = 0;
        _crc = Crc32C.Append(Crc32C.Initial, _record);
    }

    private int Take(Span<byte> destination)
    {
        int n = Math.Min(destination.Length, _record.Length - _recordAt);
        _record.AsSpan(_recordAt, n).CopyTo(destination);
        _recordAt += n;
        return n;
    }

    /// <summary>Gives whole records only, because the device may stop after any read and a part of a record would be left over.</summary>
    private int ReadPreview(Span<byte> destination)
    {
        int room = destination.Length - VfioUserStateFormat.HeadBytes;
        if (room <= 0 || _preview?.Invoke(room) is not { } section) return 0;
        int length = checked((int)section.LengthBytes);
        VfioUserStateFormat.WriteHead(destination, VfioUserStateFormat.Preview, section.Id, section.LengthBytes);
        section.Fill(0, destination.Slice(VfioUserStateFormat.HeadBytes, length));
        return VfioUserStateFormat.HeadBytes + length;
    }

    private int ReadSnapshot(Span<byte> destination)
    {
        if (_isEnded) return 0;
        if (_section is not null && _sectionAt < _section.LengthBytes)
        {
            int n = (int)Math.Min((ulong)destination.Length, _section.LengthBytes - _sectionAt);
            _section.Fill(_sectionAt, destination[..n]);
            _crc = Crc32C.Append(_crc, destination[..n]);
            _sectionAt += (uint)n;
            return n;
        }
        _sections ??= _snapshot().GetEnumerator();
        _record = new byte[VfioUserStateFormat.HeadBytes];
        _recordAt = 0;
        if (_sections.MoveNext())
        {
            (_section, _sectionAt) = (_sections.Current, 0);
            VfioUserStateFormat.WriteHead(_record, VfioUserStateFormat.Section, _section.Id, _section.LengthBytes);
            _crc = Crc32C.Append(_crc, _record);
        }
        else
        {
            _isEnded = true;
            VfioUserStateFormat.WriteHead(_record, VfioUserStateFormat.End, ~_crc, 0);
        }
        return Take(destination);
    }
}
