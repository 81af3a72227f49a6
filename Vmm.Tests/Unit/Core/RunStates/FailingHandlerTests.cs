using Vmm.Core.Devices;
using Vmm.Core.Errors;
using Vmm.Core.RunStates;
using Vmm.Tests.Support;

namespace Vmm.Tests.Unit.Core.RunStates;

/// <summary>What becomes of a VM whose parts fail when it starts, stops or is reset.</summary>
[TestFixture, Parallelizable(ParallelScope.All)]
public sealed class FailingHandlerTests
{
    [Test]
    public void AStartEndsAtTheFirstFailureAndIsUndone([Values] bool inPrepare)
    {
        using TestVm vm = TestVm.WithRam(1 << 20);
        var log = new List<string>();
        IRunStateNotifier states = vm.Vm.RunState;
        var failing = new Handler("b", log) { Fails = inPrepare ? "prepare b" : "start b" };
        using IDisposable a = states.Register(new Handler("a", log), 1), b = states.Register(failing, 2), cpu = states.Register(new Handler("cpu", log), 3);
        var told = new List<DeviceStateException>();
        states.ChangeFailed += told.Add;
        DeviceStateException e = Assert.Throws<DeviceStateException>(vm.Vm.Cont)!;
        Assert.That(e.Message, Does.Contain("'b'").And.Contain("will not"));
        Assert.That(told, Is.EqualTo((DeviceStateException[])[e]));
        Assert.That(log, Has.None.EqualTo("start cpu"), "a vCPU must not run beside a device that did not start");
        Assert.That(log.TakeLast(3), Is.EqualTo((string[])["stop cpu", "stop b", "stop a"]), "whoever began is stopped again");
        Assert.That((states.State, states.IsRunning), Is.EqualTo((RunState.PreLaunch, false)));
        failing.Fails = "";
        vm.Vm.Cont();
        Assert.That(states.IsRunning);
    }

    [Test]
    public void AStopThatFailsTellsTheOthersAndReachesItsState()
    {
        using TestVm vm = TestVm.WithRam(1 << 20);
        var log = new List<string>();
        IRunStateNotifier states = vm.Vm.RunState;
        using IDisposable a = states.Register(new Handler("a", log), 1), b = states.Register(new Handler("b", log) { Fails = "stop b" }, 2);
        vm.Vm.Cont();
        log.Clear();
        Assert.That(vm.Vm.Stop, Throws.TypeOf<DeviceStateException>());
        Assert.That((string.Join(',', log.TakeLast(2)), states.State), Is.EqualTo(("stop b,stop a", RunState.Paused)));
    }

    [Test]
    public void AResetReachesAllDevicesAlthoughOneThrowsOrDoesNotStop()
    {
        using TestVm vm = TestVm.WithRam(1 << 20);
        var log = new List<string>();
        foreach (string id in (string[])["a", "b", "c"]) vm.Vm.AddDevice(_ => new Device(id, log));
        using IDisposable stubborn = vm.Vm.RunState.Register(new Handler("s", log) { Fails = "stop s" });
        vm.Vm.Cont();
        log.Clear();
        vm.Vm.Reset();
        Assert.That(log.Where(static l => l.StartsWith("reset", StringComparison.Ordinal)), Is.EqualTo((string[])["reset a", "reset b", "reset c"]));
        Assert.That(vm.Vm.RunState.IsRunning, "a device that does not stop is reset all the same");
        ((Device)vm.Vm.Devices[0]).Fails = true;
        log.Clear();
        Assert.That(vm.Vm.Reset, Throws.TypeOf<DeviceStateException>().With.Message.EqualTo("device 'a' could not be reset: will not"));
        Assert.That(log.Where(static l => l.StartsWith("reset", StringComparison.Ordinal)), Is.EqualTo((string[])["reset a", "reset b", "reset c"]));
        Assert.That(vm.Vm.RunState.State, Is.EqualTo(RunState.Paused), "nobody knows what the device holds");
        ((Device)vm.Vm.Devices[0]).Fails = false;
        vm.Vm.Reset();
        vm.Vm.Cont();
    }

    private sealed class Handler(string id, List<string> log) : IVmStateHandler, INamedPart
    {
        public string Id => id;

        public string Fails { get; set; } = "";

        public void OnVmStatePrepare(bool running, RunState state) => Note(running ? "prepare" : "prepare-stop");

        public void OnVmStateChange(bool running, RunState state) => Note(running ? "start" : "stop");

        private void Note(string what)
        {
            log.Add($"{what} {id}");
            if (Fails == $"{what} {id}") throw new InvalidOperationException("will not");
        }
    }

    private sealed class Device(string id, List<string> log) : IVmDevice
    {
        public string Id => id;

        public bool Fails { get; set; }

        public void Reset()
        {
            log.Add($"reset {id}");
            if (Fails) throw new InvalidOperationException("will not");
        }

        public void Dispose()
        {
        }
    }
}
