using System.Collections.Concurrent;
using System.Diagnostics;
using Vmm.Core.Pci;

namespace Vmm.Tests.Fakes;

/// <summary>Records the interrupts that PCI functions raise.</summary>
internal sealed class RecordingInterruptController : IInterruptController
{
    /// <summary>Every change of a line, in order.</summary>
    public ConcurrentQueue<(int Line, bool Level)> Intx { get; } = [];

    /// <summary>Every message, in order.</summary>
    public ConcurrentQueue<(MsiMessage Message, ushort RequesterId)> Msi { get; } = [];

    public bool[] Levels { get; } = new bool[PciHost.IntxLines];

    public void SetIntx(int line, bool level)
    {
        Levels[line] = level;
        Intx.Enqueue((line, level));
    }

    public void SendMsi(MsiMessage message, ushort requesterId) => Msi.Enqueue((message, requesterId));

    /// <summary>Waits, with a deadline, for interrupts that another thread delivers.</summary>
    public void WaitFor(Func<RecordingInterruptController, bool> condition, string what)
    {
        var clock = Stopwatch.StartNew();
        while (!condition(this))
        {
            if (clock.Elapsed > TimeSpan.FromSeconds(10)) Assert.Fail($"no {what} within 10 s");
            Thread.Yield();
        }
    }
}
