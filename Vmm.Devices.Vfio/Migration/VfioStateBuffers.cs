using Vmm.Core.Errors;
using Vmm.Core.SaveVm;

namespace Vmm.Devices.Vfio.Migration;

/// <summary>
/// Puts a device's packets in order: several threads add them in any order, one takes them one by one (vfio-migration 3.7; QEMU:
/// <c>VFIOStateBuffers</c>). Who adds more than the queue has room for waits, except with the packet that comes next, so the queue always moves on. Thread-safe.
/// </summary>
/// <param name="device">Name for messages.</param>
/// <param name="maxQueuedBytes">The user's limit; more is an error (x-migration-max-queued-buffers-size).</param>
internal sealed class VfioStateBuffers(string device, ulong maxQueuedBytes) : IDisposable
{
    /// <summary>
    /// Most bytes that wait in memory: more than the channels of a source send while the device is busy with one packet of 1 MiB. A source could otherwise make
    /// this process hold any amount, because QEMU's limit is infinite by default.
    /// </summary>
    internal const int MaxHeldBytes = 64 << 20;

    /// <summary>Memory that a packet takes beside its bytes, so that many small packets are bounded too.</summary>
    internal const int PacketCostBytes = 256;

    private readonly object _gate = new();
    private readonly Dictionary<uint, StateBuffer> _waiting = [];
    private uint _next;
    private uint? _last;
    private ulong _queuedBytes;
    private long _heldBytes;
    private Exception? _failure;

    /// <summary>Takes the data of one packet.</summary>
    /// <param name="data">Valid during the call.</param>
    /// <param name="isConfig">The config record.</param>
    internal delegate void Consumer(ReadOnlySpan<byte> data, bool isConfig);

    /// <summary>Takes a packet; waits while there is no room for it.</summary>
    /// <param name="packet">Header and data; owned by the queue from here on, also when it is refused.</param>
    internal void Insert(StateBuffer packet)
    {
        bool taken = false;
        try
        {
            (uint index, bool isConfig) = VfioStatePacket.ReadHeader(device, packet.Span);
            int bytes = packet.Length - VfioStatePacket.HeaderBytes;
            lock (_gate)
            {
                Check(index, isConfig, (ulong)bytes);
                // A source sends a device's packets on each channel in order. So the next one is never behind a packet that waits here.
                while (index != _next && _heldBytes + Cost(packet) > MaxHeldBytes)
                {
                    Monitor.Wait(_gate);
                    Check(index, isConfig, (ulong)bytes);
                }
                _waiting.Add(index, packet);
                taken = true;
                _queuedBytes += (ulong)bytes;
                _heldBytes += Cost(packet);
                if (isConfig) _last = index;
                Monitor.PulseAll(_gate);
            }
        }
        finally
        {
            if (!taken) packet.Dispose();
        }
    }

    /// <summary>Waits for the next packet in order.</summary>
    /// <returns>True if it was the config, which is the last.</returns>
    internal bool Take(Consumer consume)
    {
        StateBuffer? packet;
        bool isLast;
        lock (_gate)
        {
            while (!_waiting.Remove(_next, out packet))
            {
                if (_failure is not null) throw new DeviceStateException($"device '{device}' loads no more: {_failure.Message}", _failure);
                Monitor.Wait(_gate);
            }
            isLast = _last == _next;
            _next++;
            // The packet that is next now may be one that waits for room.
            Monitor.PulseAll(_gate);
        }
        try
        {
            consume(packet.Span[VfioStatePacket.HeaderBytes..], isLast);
        }
        finally
        {
            lock (_gate)
            {
                _queuedBytes -= (ulong)(packet.Length - VfioStatePacket.HeaderBytes);
                _heldBytes -= Cost(packet);
                Monitor.PulseAll(_gate);
            }
            packet.Dispose();
        }
        return isLast;
    }

    /// <summary>Ends all waits, now and later, with an error.</summary>
    /// <param name="reason">Reason; the first one stays.</param>
    internal void Abort(Exception reason)
    {
        lock (_gate)
        {
            _failure ??= reason;
            Monitor.PulseAll(_gate);
        }
    }

    public void Dispose()
    {
        lock (_gate)
        {
            foreach (StateBuffer packet in _waiting.Values) packet.Dispose();
            _waiting.Clear();
        }
    }

    private static long Cost(StateBuffer packet) => packet.Length + PacketCostBytes;

    private void Check(uint index, bool isConfig, ulong bytes)
    {
        if (_failure is not null) throw new DeviceStateException($"device '{device}' loads no more: {_failure.Message}", _failure);
        if (index < _next || _waiting.ContainsKey(index)) throw new StreamFormatException($"device '{device}': state packet {index} came twice");
        if (_last is { } last && (isConfig || index > last)) throw new StreamFormatException($"device '{device}': state packet {index} after the last one, {last}");
        if (isConfig && _waiting.Keys.Any(k => k > index)) throw new StreamFormatException($"device '{device}': config packet {index} is not the last one");
        if (bytes > maxQueuedBytes - _queuedBytes)
            throw new StreamLimitException($"device '{device}': {_queuedBytes} bytes wait and {bytes} more are over {maxQueuedBytes} (x-migration-max-queued-buffers-size)");
    }
}
