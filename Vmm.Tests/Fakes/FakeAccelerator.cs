using Vmm.Core;
using Vmm.Core.Devices;
using Vmm.Core.Interop;
using Vmm.Core.Memory;
using Vmm.Core.Pci;
using Vmm.Core.RunStates;

namespace Vmm.Tests.Fakes;

/// <summary>An accelerator without vCPUs. It records the irqfds, MSI routes and memory slots by which devices reach the guest directly.</summary>
internal sealed class FakeAccelerator : IAccelerator
{
    /// <summary>Whether the accelerator signals resample eventfds; without them it refuses irqfds for lines.</summary>
    internal bool HasResample { get; set; } = true;

    /// <summary>The lines that have an irqfd, each with its trigger and its resample eventfd.</summary>
    internal Dictionary<int, (OwnedFd Trigger, OwnedFd Resample)> Pins { get; } = [];

    internal int[] Lines => [.. Pins.Keys];

    /// <summary>Guest addresses of the mapped device memory.</summary>
    internal ulong[] Slots => [.. Ranges.Select(static r => r.Start)];

    /// <summary>Guest addresses and lengths of the mapped device memory.</summary>
    internal List<(ulong Start, ulong Bytes)> Ranges { get; } = [];

    /// <summary>The messages of the routes that have one.</summary>
    internal List<MsiMessage> Messages { get; } = [];

    /// <summary>Count of routes that were not disposed.</summary>
    internal int Routes { get; private set; }

    public string Name => "fake";

    public GuestRunTimes RunTimes => default;

    public void Reset()
    {
    }

    public void LoadProgram()
    {
    }

    public void OnVmStateChange(bool running, RunState state)
    {
    }

    public IDisposable? AddIrqFd(int line, OwnedFd trigger, OwnedFd resample)
    {
        if (!HasResample) return null;
        Pins.Add(line, (trigger, resample));
        return new Registration(() => Pins.Remove(line));
    }

    public IMsiRoute AddMsiRoute(OwnedFd trigger)
    {
        Routes++;
        return new Route(this);
    }

    public IDisposable? MapMmio(GuestRange range, MappedRegion region, ulong offsetBytes)
    {
        (ulong, ulong) added = (range.Start.Value, range.LengthBytes);
        Ranges.Add(added);
        return new Registration(() => Ranges.Remove(added));
    }

    public void Dispose()
    {
    }

    private sealed class Route(FakeAccelerator owner) : IMsiRoute
    {
        private MsiMessage? _message;

        public void Set(MsiMessage? message)
        {
            if (_message is { } before) owner.Messages.Remove(before);
            _message = message;
            if (message is { } now) owner.Messages.Add(now);
        }

        public void Dispose()
        {
            Set(null);
            owner.Routes--;
        }
    }
}
