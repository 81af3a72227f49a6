using Vmm.Core.Devices;
using Vmm.Devices.Vfio.Abstractions;
using Vmm.Devices.Vfio.User.Wire;

namespace Vmm.Devices.Vfio.User.Client;

/// <summary>Options of one vfio-user connection, as given to <c>--device vfio-user-pci</c>.</summary>
internal sealed record VfioUserOptions
{
    /// <summary><c>socket</c>: the server's socket.</summary>
    internal required string SocketPath { get; init; }

    /// <summary><c>x-msg-timeout</c>, ms: limit of a request (QEMU: <c>x-msg-timeout</c>).</summary>
    internal int TimeoutMs { get; init; } = VfioUserDeadlines.RequestMs;

    /// <summary>
    /// <c>x-mig-timeout</c>, ms: limit of a change of the migration state in which a server may write or check all its state: into STOP_COPY and out
    /// of RESUMING. Other changes have the limit of a request.
    /// </summary>
    internal int MigrationTimeoutMs { get; init; } = VfioUserDeadlines.StateMs;

    /// <summary>
    /// <c>x-mig-chunk</c>: most bytes of data in one message, sent or asked for (vfio-user C-3). Raise it only towards this project's own server;
    /// stopped state then also goes from socket to socket (<see cref="IVfioDirectData"/>).
    /// </summary>
    internal int ChunkBytes { get; init; } = VfioUserLimits.SafeDataBytes;

    /// <summary><c>discard-pre-copy</c>: data from before STOP_COPY are not part of the device's state (vfio-user C-11; libvfio-user's sample server).</summary>
    internal bool DiscardPreCopy { get; init; }

    /// <summary>
    /// <c>enable-migration=off</c>: the server gets no DEVICE_FEATURE, so that one that ends the connection at a command it does not know can be used.
    /// </summary>
    internal bool NoFeatures { get; init; }

    /// <summary><c>x-no-mmap</c>: every access by message (QEMU: <c>x-no-mmap</c>).</summary>
    internal bool NoMmap { get; init; }

    /// <summary><c>x-no-posted-writes</c>: every write waits for its reply (QEMU: <c>x-no-posted-writes</c>).</summary>
    internal bool NoPostedWrites { get; init; }

    /// <summary>Reads the options.</summary>
    /// <param name="options">Key-value options of the device.</param>
    /// <returns>Checked options.</returns>
    /// <exception cref="Core.Errors.ConfigurationException">Missing or bad option.</exception>
    internal static VfioUserOptions From(DeviceOptions options)
    {
        ArgumentNullException.ThrowIfNull(options);
        ulong chunk = options.GetSizeBytes("x-mig-chunk", VfioUserLimits.SafeDataBytes);
        if (chunk is < 1 or > VfioUserLimits.DataXferBytes)
            throw new Core.Errors.ConfigurationException($"device '{options.TypeName}': option 'x-mig-chunk' expects 1 to 1M, found {chunk}");
        return new VfioUserOptions
        {
            SocketPath = options.GetRequired("socket"),
            TimeoutMs = Milliseconds(options, "x-msg-timeout", VfioUserDeadlines.RequestMs),
            MigrationTimeoutMs = Milliseconds(options, "x-mig-timeout", VfioUserDeadlines.StateMs),
            ChunkBytes = (int)chunk,
            NoFeatures = options.GetString("enable-migration", "auto") == "off",
            DiscardPreCopy = options.GetBool("discard-pre-copy", false),
            NoMmap = options.GetBool("x-no-mmap", false),
            NoPostedWrites = options.GetBool("x-no-posted-writes", false),
        };
    }

    private static int Milliseconds(DeviceOptions options, string key, int fallback)
    {
        ulong value = options.GetUInt64(key, (ulong)fallback, 3_600_000);
        return value > 0 ? (int)value : throw new Core.Errors.ConfigurationException($"device '{options.TypeName}': option '{key}' must not be 0");
    }
}
