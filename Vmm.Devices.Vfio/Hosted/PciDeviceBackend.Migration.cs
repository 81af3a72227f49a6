using Vmm.Core.Channels;
using Vmm.Core.Devices;
using Vmm.Core.Errors;
using Vmm.Core.Threading;
using Vmm.Core.Wire;
using Vmm.Devices.Vfio.Abstractions;
using Vmm.Devices.Vfio.User.Backend;
using Vmm.Devices.Vfio.User.Server;
using Vmm.Devices.Vfio.User.Wire;

namespace Vmm.Devices.Vfio.Hosted;

// State: section 2 has interrupt levels and pending vectors; section 1, repeated for each piece, has the stream of HostedStream.
public sealed partial class PciDeviceBackend
{
    private const uint StreamSection = 1, IrqSection = 2;
    private const int PieceBytes = 64 << 10;

    private volatile SavePipe? _pipe;

    /// <inheritdoc/>
    public IVfioUserSave OpenSave() => new VfioUserStateWriter(TypeName, LimitBytes, _host.State == VfioDeviceState.StopCopy, Snapshot);

    /// <inheritdoc/>
    public IVfioUserLoad OpenLoad()
    {
        var incoming = new Incoming(this);
        return new Session(new VfioUserStateReader(TypeName, LimitBytes, incoming), incoming);
    }

    /// <summary>Runs the save code on its own thread, ahead of the client by as much as the pipe holds (vfio-user S-44, S-45), until the session ends.</summary>
    private IEnumerable<VfioUserStateSection> Snapshot()
    {
        yield return VfioUserStateSection.Of(IrqSection, _host.Irqs.SaveState());
        var pipe = new SavePipe(LimitBytes);
        Vm vm = _vm.Vm;
        _pipe = pipe;
        Task saving = WorkerThread.Run("vfu-save", () =>
        {
            if (Save(vm, pipe) is { } bytes) Interlocked.Exchange(ref _stateBytes, (ulong)bytes);
        });
        try
        {
            while (true)
            {
                byte[] piece = new byte[PieceBytes];
                int n = pipe.Read(piece);
                if (n == 0) yield break;
                yield return VfioUserStateSection.Of(StreamSection, n == piece.Length ? piece : piece[..n]);
            }
        }
        finally
        {
            pipe.Break();
            saving.GetAwaiter().GetResult();
            _pipe = null;
        }
    }

    /// <returns>Length of the state; null if it was not saved to its end.</returns>
    private static long? Save(Vm vm, SavePipe pipe)
    {
        Exception? error = null;
        long? bytes = null;
        try
        {
            using var f = new QemuFileWriter(pipe);
            HostedStream.Save(vm, f);
            bytes = f.Position;
        }
        catch (OperationCanceledException)
        {
            // The client cancelled its migration, so the session was closed before the end.
        }
#pragma warning disable CA1031 // The reader reports whatever the device threw.
        catch (Exception e)
#pragma warning restore CA1031
        {
            error = e;
        }
        pipe.End(error);
        return bytes;
    }

    private void LogLoad(VmmException e) => VfioUserLog.DeviceFailed(_host.Logger, TypeName, VfioUserCommand.MigDataWrite, VmmException.Describe(e));

    /// <summary>Lets the save code finish, because while it waits for room it may hold the BQL, which register accesses need.</summary>
    private void LetSaveGoOn() => _pipe?.Lift();

    private sealed class Session(VfioUserStateReader reader, Incoming incoming) : IVfioUserLoad
    {
        public Errno WriteState(ReadOnlySpan<byte> source) => reader.WriteState(source);

        public ValueTask<Errno> Commit() => reader.Commit();

        public void Dispose()
        {
            reader.Dispose();
            incoming.Dispose();
        }
    }

    /// <summary>One load into a second VM; a thread parses the sections as they come.</summary>
    private sealed class Incoming(PciDeviceBackend backend) : IVfioUserStateSink, IDisposable
    {
        private HostedVm? _vm;
        private InMemoryChannel? _ours;
        private Task _loading = Task.CompletedTask;
        private byte[]? _irqs;
        private int _irqBytes;

        public void BeginSnapshot()
        {
            Dispose();
            (_irqs, _irqBytes) = (null, 0);
            HostedVm vm = _vm = new HostedVm(backend._configure, backend._options(), isIncoming: true);
            (InMemoryChannel ours, InMemoryChannel theirs) = InMemoryChannel.CreatePair(VfioUserLimits.StatePipeBytes);
            _ours = ours;
            _loading = WorkerThread.Run("vfu-load", () =>
            {
                try
                {
                    HostedStream.Load(vm.Vm, new QemuFileReader(theirs));
                }
                finally
                {
                    // The session's thread may still wait for room in the pipe.
                    theirs.Shutdown(ChannelShutdown.Read);
                }
            });
        }

        public Errno BeginSection(uint id, ulong lengthBytes)
        {
            if (id == StreamSection) return Errno.None;
            if (id != IrqSection || _irqs is not null || lengthBytes != (ulong)backend._host.Irqs.SaveState().Length) return Errno.EINVAL;
            _irqs = new byte[lengthBytes];
            return Errno.None;
        }

        public Errno SectionData(uint id, ulong offset, ReadOnlySpan<byte> data)
        {
            if (id == IrqSection)
            {
                data.CopyTo(_irqs.AsSpan((int)offset));
                _irqBytes += data.Length;
                return Errno.None;
            }
            try
            {
                _ours!.Write(data);
                return Errno.None;
            }
            catch (ChannelException)
            {
                // The parsing thread has ended, either too early or with an error.
                return Why(_loading) is var errno and not Errno.None ? errno : Errno.EINVAL;
            }
        }

        public async ValueTask<Errno> Commit()
        {
            if (_vm is null || _irqs is null || _irqBytes != _irqs.Length) return Errno.EINVAL;
            _ours!.Shutdown(ChannelShutdown.Write);
            await Task.WhenAny(_loading);
            Errno errno = Why(_loading);
            if (errno != Errno.None) return errno;
            HostedVm vm = _vm;
            _vm = null;
            return backend.Adopt(vm, _irqs);
        }

        public void Dispose()
        {
            _ours?.Dispose();
            _ = Why(_loading);
            _vm?.Dispose();
            (_vm, _ours, _loading) = (null, null, Task.CompletedTask);
        }

        private Errno Why(Task loading)
        {
            try
            {
                loading.GetAwaiter().GetResult();
                return Errno.None;
            }
            catch (VmmException e)
            {
                backend.LogLoad(e);
                return e.Errno == Errno.None ? Errno.EINVAL : e.Errno;
            }
        }
    }

    /// <summary>Puts the loaded VM in the place of the old one and signals its pending interrupts.</summary>
    private Errno Adopt(HostedVm vm, byte[] irqs)
    {
        vm.EndIncoming();
        HostedVm before = _vm;
        before.Disconnect();
        _vm = vm;
        bool fits = _host.Irqs.LoadState(irqs);
        vm.Connect(_host, _gate);
        FollowBusMaster();
        before.Dispose();
        return fits ? Errno.None : Errno.EINVAL;
    }
}
