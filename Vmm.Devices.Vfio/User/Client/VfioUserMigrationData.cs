using Vmm.Core.Errors;
using Vmm.Devices.Vfio.Abstractions;
using Vmm.Devices.Vfio.User.Wire;

namespace Vmm.Devices.Vfio.User.Client;

/// <summary>
/// One saving or resuming session by MIG_DATA_READ and MIG_DATA_WRITE (vfio-user 8.1). It ends when the device leaves the state, is reset
/// or lost, or when it is disposed. Afterwards it answers ENODEV, as the kernel's descriptor does.
/// </summary>
internal sealed partial class VfioUserMigrationData(VfioUserClient client, bool resuming, VfioUserOptions options) : IVfioMigrationData, IVfioDirectData
{
    private readonly int _chunkBytes = Math.Min(options.ChunkBytes, client.MaxDataBytes);
    private volatile bool _ended;
    private volatile bool _isPreCopy;

    /// <summary>True for a resuming session, which writes; false for a saving one.</summary>
    internal bool IsResuming => resuming;

    /// <summary>The device still runs.</summary>
    internal bool IsPreCopy { get => _isPreCopy; set => _isPreCopy = value; }

    /// <inheritdoc/>
    public int Read(Span<byte> destination, out Errno errno)
    {
        if (!MayRun(!resuming, destination.Length, out errno)) return -1;
        if (_isPreCopy && options.DiscardPreCopy)
        {
            errno = Errno.ENOMSG;
            return 0;
        }
        int asked = Math.Min(destination.Length, _chunkBytes);
        using VfioUserExchange x = client.Begin();
        new VfioUserMigData((uint)(VfioUserMigData.Length + asked), (uint)asked).Write(x.Body(VfioUserMigData.Length));
        errno = x.Run(VfioUserCommand.MigDataRead, VfioUserMigData.Length + asked);
        if (errno != Errno.None) return -1;
        // libvfio-user pads the message to the size asked for; only the size field says how many bytes are data (vfio-user C-9).
        if (!VfioUserMigData.TryRead(x.Reply, out VfioUserMigData head) || head.Size > asked || head.Size > x.Reply.Length - VfioUserMigData.Length)
        {
            client.Fail(new VfioUserProtocolException($"vfio-user '{client.Name}': {head.Size} bytes of migration data in a reply of {x.Reply.Length}, {asked} were asked for"));
            errno = Errno.ENODEV;
            return -1;
        }
        x.Reply.Slice(VfioUserMigData.Length, (int)head.Size).CopyTo(destination);
        return (int)head.Size;
    }

    /// <inheritdoc/>
    public int Write(ReadOnlySpan<byte> source, out Errno errno)
    {
        if (!MayRun(resuming, source.Length, out errno)) return -1;
        int n = Math.Min(source.Length, _chunkBytes);
        using VfioUserExchange x = client.Begin();
        new VfioUserMigData((uint)(VfioUserMigData.Length + n), (uint)n).Write(x.Body(VfioUserMigData.Length));
        errno = x.Run(VfioUserCommand.MigDataWrite, data: source[..n]);
        return errno == Errno.None ? n : -1;
    }

    /// <inheritdoc/>
    public Errno PrecopyInfo(out VfioPrecopyInfo info)
    {
        info = default;
        return Errno.ENOTTY;
    }

    /// <inheritdoc/>
    public void Dispose()
    {
        _ended = true;
        EndMoves();
    }

    private bool MayRun(bool rightDirection, int length, out Errno errno)
    {
        errno = _ended ? Errno.ENODEV : !rightDirection ? Errno.EBADF : length == 0 ? Errno.EINVAL : Errno.None;
        return errno == Errno.None;
    }
}
