using System.Buffers.Binary;
using Vmm.Core.Errors;
using Vmm.Devices.Vfio.Abstractions;
using Vmm.Devices.Vfio.User.Wire;

namespace Vmm.Devices.Vfio.User.Client;

/// <summary>DEVICE_FEATURE towards one server (vfio-user 4). Thread-safe.</summary>
internal sealed class VfioUserFeatures(VfioUserClient client)
{
    private readonly Lock _gate = new();
    private readonly Dictionary<VfioDeviceFeature, bool> _known = [];

    /// <summary>The server must not get this command: every feature is unknown. Set before the first use.</summary>
    internal bool IsSilent { get; set; }

    /// <summary>The process before this one found that the server ends the connection at this command.</summary>
    internal bool IsKnownToEnd { get; private set; }

    /// <summary>The server's answer to GET MIGRATION; null until <see cref="AskMigration"/>.</summary>
    internal (Errno Errno, ulong Flags)? Migration { get; private set; }

    /// <summary>Asks how the device migrates, while the connection can still be replaced by one without this command.</summary>
    internal void AskMigration()
    {
        if (IsSilent)
        {
            Migration = (Errno.ENOTTY, 0);
            return;
        }
        Span<byte> data = stackalloc byte[sizeof(ulong)];
        data.Clear();
        Errno errno = Call(VfioDeviceFeature.Migration, VfioFeatureOp.Get, data, client.TimeoutMs);
        Migration = (errno, BinaryPrimitives.ReadUInt64LittleEndian(data));
        // The record that the process before this one left in the transcript.
        if (errno != Errno.ENODEV || client.Fault is not null) return;
        IsSilent = IsKnownToEnd = true;
        Migration = (Errno.ENOTTY, 0);
    }

    /// <summary>Whether the server knows a feature; the answer is cached.</summary>
    /// <returns>False also when the connection is gone.</returns>
    internal bool Knows(VfioDeviceFeature feature)
    {
        if (IsSilent) return false;
        lock (_gate)
        {
            if (_known.TryGetValue(feature, out bool known)) return known;
        }
        Errno errno = Run(feature, VfioFeatureOp.Probe, default, client.TimeoutMs);
        if (errno == Errno.ENODEV && client.Fault is not null) return false;
        lock (_gate) return _known[feature] = errno == Errno.None;
    }

    /// <summary>Runs one operation on a feature. After EINVAL it probes the feature, because some servers answer that for one they do not know.</summary>
    /// <param name="feature">Feature.</param>
    /// <param name="op">Operation.</param>
    /// <param name="data">Sent with SET, received with GET and SET.</param>
    /// <param name="timeoutMs">Limit.</param>
    /// <returns>ENOTTY for an unknown feature.</returns>
    internal Errno Call(VfioDeviceFeature feature, VfioFeatureOp op, Span<byte> data, int timeoutMs)
    {
        if (IsSilent) return Errno.ENOTTY;
        if (feature == VfioDeviceFeature.Migration && op == VfioFeatureOp.Get && Migration is { } told && client.Fault is null && data.Length == sizeof(ulong))
        {
            BinaryPrimitives.WriteUInt64LittleEndian(data, told.Flags);
            return told.Errno;
        }
        Errno errno = Run(feature, op, data, timeoutMs);
        if (errno != Errno.EINVAL) return errno;
        return op.HasFlag(VfioFeatureOp.Probe) || !Knows(feature) ? Errno.ENOTTY : Errno.EINVAL;
    }

    private Errno Run(VfioDeviceFeature feature, VfioFeatureOp op, Span<byte> data, int timeoutMs)
    {
        bool sends = op == VfioFeatureOp.Set;
        int full = VfioUserFeature.Length + data.Length;
        using VfioUserExchange x = client.Begin();
        Span<byte> body = x.Body(sends ? full : VfioUserFeature.Length);
        new VfioUserFeature((uint)full, feature, op).Write(body);
        if (sends) data.CopyTo(body[VfioUserFeature.Length..]);
        Errno errno = x.Run(VfioUserCommand.DeviceFeature, full, timeoutMs: timeoutMs);
        if (errno != Errno.None || data.IsEmpty) return errno;
        // A SET has been done even if the reply lacks its data; a GET without data has failed.
        if (x.Reply.Length >= full) x.Reply[VfioUserFeature.Length..full].CopyTo(data);
        else if (op.HasFlag(VfioFeatureOp.Get)) return Errno.EPROTO;
        return Errno.None;
    }
}
