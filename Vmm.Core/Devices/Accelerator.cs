using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Core.Memory;
using Vmm.Core.Pci;
using Vmm.Core.RunStates;
using Vmm.Core.Threading;

namespace Vmm.Core.Devices;

/// <summary>What runs the guest's instructions.</summary>
public interface IAccelerator : IVmStateHandler, IDisposable
{
    /// <summary>Its name, as in <c>--accel NAME</c>.</summary>
    string Name { get; }

    /// <summary>When the guest ran last. Exact while the VM is stopped or has just been started. BQL: held.</summary>
    GuestRunTimes RunTimes { get; }

    /// <summary>Puts vCPUs and interrupt controllers into their power-on state and leaves memory alone: another state may follow. BQL: held, vCPUs stopped.</summary>
    void Reset();

    /// <summary>Loads the guest's program, as when the machine was switched on; after <see cref="Reset"/>. BQL: held, vCPUs stopped.</summary>
    void LoadProgram();

    /// <summary>
    /// A message that an eventfd raises in the guest without this process; it starts detached. BQL: held, also for the route's members.
    /// </summary>
    /// <param name="trigger">The eventfd; must stay open until the route is disposed. While it is attached, nobody else may read it.</param>
    /// <returns>The route; null when the accelerator has no such way, and the VMM must watch the eventfd itself.</returns>
    IMsiRoute? AddMsiRoute(OwnedFd trigger) => null;

    /// <summary>Lets an eventfd raise a level-triggered line of the PCI bus without this process. BQL: held.</summary>
    /// <param name="line">0 to 3, as in <c>IInterruptController.SetIntx</c>; the levels of both ways add up.</param>
    /// <param name="trigger">The eventfd that raises the line; must stay open until disposal.</param>
    /// <param name="resample">Is signalled when the guest has acknowledged the interrupt and the line was lowered.</param>
    /// <returns>Dispose to detach it, which also lowers the line; null when there is no such way.</returns>
    IDisposable? AddIrqFd(int line, OwnedFd trigger, OwnedFd resample) => null;

    /// <summary>Lets a guest's write signal an eventfd instead of reaching the device. BQL: held.</summary>
    /// <param name="at">Where.</param>
    /// <param name="target">The eventfd; must stay open until disposal.</param>
    /// <returns>Dispose to detach it; null when there is no such way or the place is taken.</returns>
    IDisposable? AddIoEventFd(IoEventFdRange at, OwnedFd target) => null;

    /// <summary>
    /// Shows the registers of a device to the guest as memory, so that its accesses never leave it; what it writes is in no dirty log. BQL: held.
    /// </summary>
    /// <param name="range">Where; page aligned.</param>
    /// <param name="region">The device's mapping, kept alive until disposal.</param>
    /// <param name="offsetBytes">Where in the mapping; page aligned.</param>
    /// <returns>Dispose to take it away, after which the guest's accesses are trapped again; null when they have to be trapped, e.g. over RAM.</returns>
    IDisposable? MapMmio(GuestRange range, MappedRegion region, ulong offsetBytes) => null;
}

/// <summary>
/// When a guest ran, as the threads of its vCPUs saw it: what it can notice of its downtime, apart from what the host's scheduler does to it.
/// CLOCK_MONOTONIC in ns, one clock for all processes of a host; 0 for never.
/// </summary>
/// <param name="EnteredAtNs">When the first vCPU went to run the guest after the last start.</param>
/// <param name="LeftAtNs">When the last vCPU left the guest.</param>
public readonly record struct GuestRunTimes(long EnteredAtNs, long LeftAtNs);

/// <summary>A message-signalled interrupt that an eventfd raises without this process. BQL: held for every call.</summary>
public interface IMsiRoute : IDisposable
{
    /// <summary>Sets the message and attaches the eventfd, or detaches it: a masked vector's signals then stay in the eventfd, to be read as pending.</summary>
    /// <param name="message">The message, or null to detach.</param>
    void Set(MsiMessage? message);
}

/// <summary>Which writes of the guest signal an eventfd.</summary>
/// <param name="Address">Guest-physical address or I/O port.</param>
/// <param name="SizeBytes">1, 2, 4 or 8; 0 for writes of any size to memory.</param>
/// <param name="IsPort">Whether it is an I/O port.</param>
/// <param name="Match">The value, or null for any; needs a size.</param>
public readonly record struct IoEventFdRange(ulong Address, int SizeBytes, bool IsPort, ulong? Match = null);

/// <summary>The VM's accelerator, which is made before its devices. BQL: held.</summary>
public sealed class CurrentAccelerator
{
    /// <summary>The accelerator, or null.</summary>
    public IAccelerator? Value { get; internal set; }
}

/// <summary>Makes accelerators of one kind.</summary>
public interface IAcceleratorFactory
{
    /// <summary>Its name, as in <c>--accel NAME</c>.</summary>
    string Name { get; }

    /// <summary>Whether it can be used on this host; asked for <c>auto</c>.</summary>
    /// <returns>Null, or why not.</returns>
    VmmException? Probe();

    /// <summary>Makes an accelerator for a VM whose RAM is there and whose devices are not. BQL: held. Nothing is left behind on failure.</summary>
    /// <param name="options">The VM's options.</param>
    /// <param name="services">The VM's services.</param>
    /// <returns>The accelerator, owned by the VM.</returns>
    IAccelerator Create(VmOptions options, IDeviceServices services);
}

/// <summary>The program that a guest starts with.</summary>
public sealed record KernelOptions
{
    /// <summary>A flat binary, an ELF file or a Linux bzImage.</summary>
    public required string KernelPath { get; init; }

    /// <summary>The file's content when it is not to be read from <see cref="KernelPath"/>, which is then only its name.</summary>
    public ReadOnlyMemory<byte>? Image { get; init; }

    /// <summary>Linux initial RAM disk, or null.</summary>
    public string? InitrdPath { get; init; }

    /// <summary>Command line.</summary>
    public string CommandLine { get; init; } = "";
}

/// <summary>Sixteen interrupt lines of the ISA bus, and who takes them. BQL: held for every call.</summary>
public sealed class IsaIrqs
{
    private readonly bool[] _levels = new bool[16];
    private Action<int, bool>? _target;

    /// <summary>Sets a line.</summary>
    /// <param name="line">0 to 15.</param>
    /// <param name="level">Asserted.</param>
    public void Set(int line, bool level)
    {
        _levels[line] = level;
        _target?.Invoke(line, level);
    }

    /// <summary>Sends changes to a target, which is told of asserted lines at once.</summary>
    /// <param name="target">Told line and level.</param>
    /// <returns>Dispose to detach it.</returns>
    public IDisposable Attach(Action<int, bool> target)
    {
        ArgumentNullException.ThrowIfNull(target);
        if (_target is not null) throw new InvalidOperationException("another interrupt target is attached");
        _target = target;
        for (int line = 0; line < _levels.Length; line++)
            if (_levels[line]) target(line, true);
        return new Registration(() => _target = null);
    }
}

/// <summary>What a guest can ask of its machine.</summary>
public enum GuestRequest
{
    /// <summary>Start again.</summary>
    Reset,
    /// <summary>Switch off.</summary>
    Shutdown,
    /// <summary>A vCPU cannot go on.</summary>
    InternalError,
}

/// <summary>
/// Requests of a guest, done on another thread than the vCPU's that makes them: a vCPU cannot wait for itself. Thread-safe (QEMU:
/// <c>qemu_system_reset_request</c>, <c>qemu_system_shutdown_request</c>).
/// </summary>
/// <param name="loop">Where they are done.</param>
public sealed class GuestRequests(EventFdLoop loop) : IDisposable
{
    private readonly Lock _gate = new();
    private readonly OwnedFd _event = Posix.EventFd();
    private GuestRequest? _pending;
    private int? _exitCode;
    private IDisposable? _registration;

    /// <summary>What the guest said when it switched itself off, or null.</summary>
    public int? ExitCode
    {
        get
        {
            lock (_gate) return _exitCode;
        }
    }

    /// <summary>Makes a request; a later one before it is done wins over a reset only.</summary>
    /// <param name="request">The request.</param>
    /// <param name="exitCode">What the guest says with it, or null.</param>
    public void Post(GuestRequest request, int? exitCode = null)
    {
        lock (_gate)
        {
            if (_pending is null or GuestRequest.Reset) _pending = request;
            if (exitCode is not null) _exitCode = exitCode;
        }
        Posix.SignalEventFd(_event);
    }

    /// <summary>Ends the watching; what is pending is dropped.</summary>
    public void Dispose()
    {
        _registration?.Dispose();
        _event.Dispose();
    }

    internal void Attach(Action<GuestRequest> handler) => _registration = loop.Add(_event, () =>
    {
        Posix.DrainEventFd(_event);
        GuestRequest? request;
        lock (_gate) (request, _pending) = (_pending, null);
        if (request is { } r) handler(r);
    });
}
