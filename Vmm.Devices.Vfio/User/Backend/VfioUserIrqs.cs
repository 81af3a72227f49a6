using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Devices.Vfio.Abstractions;
using Vmm.Devices.Vfio.User.Wire;

namespace Vmm.Devices.Vfio.User.Backend;

/// <summary>
/// A hosted device's interrupts: the client's eventfds, masks, and pending vectors (vfio-user 3.5 and 5). Raising works
/// from any thread at any time; without an eventfd a vector stays pending and is signalled when one is bound (vfio-user S-14).
/// </summary>
public sealed class VfioUserIrqs : IDisposable
{
    /// <summary>Interrupt indices of a PCI function.</summary>
    internal const uint IndexCount = 5;

    private readonly Lock _gate = new();
    private readonly Vector[][] _vectors = new Vector[IndexCount][];
    private bool _intxLevel, _intxInService;
    private long _raised;

    internal VfioUserIrqs(IVfioUserBackend backend)
    {
        for (uint i = 0; i < IndexCount; i++)
        {
            uint count = i >= VfioPciIrq.Err ? 1 : backend.GetIrqCount(i);
            ArgumentOutOfRangeException.ThrowIfGreaterThan(count, i == VfioPciIrq.Intx ? 1 : VfioUserLimits.Vectors, nameof(backend));
            _vectors[i] = new Vector[count];
        }
    }

    /// <summary>Number of interrupts that signalled an eventfd.</summary>
    public long RaisedCount => Interlocked.Read(ref _raised);

    /// <summary>Drives the INTx line. An asserted line signals once, and again each time the client unmasks it (vfio-user S-27).</summary>
    /// <param name="asserted">True to assert the line.</param>
    public void SetIntx(bool asserted)
    {
        lock (_gate)
        {
            _intxLevel = asserted;
            if (!asserted) _intxInService = false;
            else SignalIntx();
        }
    }

    /// <summary>Raises a vector of MSI, MSI-X or REQ. Do not raise ERR for ordinary device errors: it stops a QEMU guest (vfio-user S-28).</summary>
    /// <param name="index">One of <see cref="VfioPciIrq"/>, except INTx, which is a line (see <see cref="SetIntx"/>).</param>
    /// <param name="vector">Vector, from 0.</param>
    /// <exception cref="ArgumentOutOfRangeException">INTx, or the device has no such vector.</exception>
    public void Raise(uint index, uint vector)
    {
        ArgumentOutOfRangeException.ThrowIfZero(index);
        ArgumentOutOfRangeException.ThrowIfGreaterThanOrEqual(vector, (uint)_vectors[index].Length);
        lock (_gate) Signal(ref _vectors[index][vector]);
    }

    /// <summary>Whether a vector was raised and could not be signalled; a device shows it in the MSI-X pending bits.</summary>
    /// <param name="index">MSI or MSI-X.</param>
    /// <param name="vector">Vector, from 0.</param>
    /// <returns>True when the vector is pending.</returns>
    public bool IsPending(uint index, uint vector)
    {
        lock (_gate) return _vectors[index][vector].Pending;
    }

    /// <summary>Whether the INTx line is asserted.</summary>
    public bool IsIntxAsserted
    {
        get { lock (_gate) return _intxLevel; }
    }

    /// <summary>Clears levels and pending vectors and keeps eventfds, for a device's reset.</summary>
    public void ClearPending()
    {
        lock (_gate)
        {
            _intxLevel = _intxInService = false;
            foreach (Vector[] vectors in _vectors)
                for (int i = 0; i < vectors.Length; i++) vectors[i].Pending = false;
        }
    }

    /// <summary>
    /// The interrupts' part of a device's state: INTx level, then one byte per vector of MSI and MSI-X, bit 0 pending, bit 1 masked (vfio-user S-41).
    /// </summary>
    /// <returns>A new array.</returns>
    public byte[] SaveState()
    {
        lock (_gate)
        {
            byte[] state = new byte[StateBytes];
            state[0] = _intxLevel ? (byte)1 : (byte)0;
            int at = 1;
            for (uint index = VfioPciIrq.Msi; index <= VfioPciIrq.Msix; index++)
                foreach (Vector v in _vectors[index]) state[at++] = (byte)((v.Pending ? 1 : 0) | (v.Masked ? 2 : 0));
            return state;
        }
    }

    /// <summary>Loads what <see cref="SaveState"/> gave. Eventfds stay bound (vfio-user S-39), and pending vectors signal them.</summary>
    /// <param name="state">Bytes from <see cref="SaveState"/>.</param>
    /// <returns>False when the bytes do not fit this device; nothing has changed then.</returns>
    public bool LoadState(ReadOnlySpan<byte> state)
    {
        if (state.Length != StateBytes || state[0] > 1 || state[1..].IndexOfAnyExceptInRange((byte)0, (byte)3) >= 0) return false;
        lock (_gate)
        {
            _intxLevel = state[0] != 0;
            _intxInService = false;
            int at = 1;
            for (uint index = VfioPciIrq.Msi; index <= VfioPciIrq.Msix; index++)
            {
                foreach (ref Vector v in _vectors[index].AsSpan())
                {
                    byte one = state[at++];
                    (v.Pending, v.Masked) = ((one & 1) != 0, (one & 2) != 0);
                    if (v.Pending) Signal(ref v);
                }
            }
            if (_intxLevel) SignalIntx();
            return true;
        }
    }

    /// <inheritdoc/>
    public void Dispose() => Unbind();

    internal uint Count(uint index) => (uint)_vectors[index].Length;

    /// <summary>Number of eventfds that are bound.</summary>
    internal int BoundCount
    {
        get { lock (_gate) return _vectors.Sum(static v => v.Count(static x => x.EventFd is not null)); }
    }

    /// <summary>Executes SET_IRQS, which was checked. Takes the descriptors that it uses out of the list, and owns them.</summary>
    internal void Apply(in VfioIrqSet request, ReadOnlySpan<byte> bools, List<OwnedFd> fds)
    {
        lock (_gate)
        {
            Vector[] vectors = _vectors[request.Index];
            bool wholeIndex = request is { Flags: VfioIrqSetFlags.ActionTrigger | VfioIrqSetFlags.DataNone, Count: 0 };
            int first = wholeIndex ? 0 : (int)request.Start, count = wholeIndex ? vectors.Length : (int)request.Count;
            for (int i = 0; i < count; i++)
            {
                if ((request.Flags & VfioIrqSetFlags.DataBool) != 0 && bools[i] == 0) continue;
                ref Vector vector = ref vectors[first + i];
                if ((request.Flags & VfioIrqSetFlags.ActionMask) != 0) vector.Masked = true;
                else if ((request.Flags & VfioIrqSetFlags.ActionUnmask) != 0) Unmask(request.Index, ref vector);
                else if (wholeIndex || (request.Flags & VfioIrqSetFlags.DataEventFd) != 0) Bind(request.Index, ref vector, i < fds.Count && !wholeIndex ? fds[i] : null);
                else Signal(ref vector);
            }
            if ((request.Flags & VfioIrqSetFlags.DataEventFd) != 0) fds.Clear();
        }
    }

    /// <summary>Drops eventfds and masks when the client is gone. Pending vectors and the INTx level stay, because they belong to the device.</summary>
    internal void Unbind()
    {
        lock (_gate)
        {
            _intxInService = false;
            foreach (Vector[] vectors in _vectors)
            {
                foreach (ref Vector vector in vectors.AsSpan())
                {
                    vector.EventFd?.Dispose();
                    (vector.EventFd, vector.Masked) = (null, false);
                }
            }
        }
    }

    private int StateBytes => 1 + _vectors[VfioPciIrq.Msi].Length + _vectors[VfioPciIrq.Msix].Length;

    private void Bind(uint index, ref Vector vector, OwnedFd? fd)
    {
        vector.EventFd?.Dispose();
        vector.EventFd = fd;
        if (fd is null) return;
        if (index == VfioPciIrq.Intx)
        {
            _intxInService = false;
            if (_intxLevel) SignalIntx();
        }
        else if (vector.Pending)
        {
            Signal(ref vector);
        }
    }

    private void Unmask(uint index, ref Vector vector)
    {
        vector.Masked = false;
        if (index == VfioPciIrq.Intx)
        {
            _intxInService = false;
            if (_intxLevel) SignalIntx();
        }
        else if (vector.Pending)
        {
            Signal(ref vector);
        }
    }

    private void SignalIntx()
    {
        if (_vectors[VfioPciIrq.Intx].Length == 0 || _intxInService) return;
        ref Vector line = ref _vectors[VfioPciIrq.Intx][0];
        if (line.EventFd is null || line.Masked) return;
        _intxInService = true;
        Posix.SignalEventFd(line.EventFd);
        Interlocked.Increment(ref _raised);
    }

    private void Signal(ref Vector vector)
    {
        vector.Pending = vector.EventFd is null || vector.Masked;
        if (vector.Pending) return;
        Posix.SignalEventFd(vector.EventFd!);
        Interlocked.Increment(ref _raised);
    }

    private struct Vector
    {
        internal OwnedFd? EventFd;
        internal bool Masked, Pending;
    }
}
