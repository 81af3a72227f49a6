using Vmm.Core.Devices;
using Vmm.Core.RunStates;
using Vmm.Core.VmStates;
using Vmm.Tests.Support;
using static Vmm.Tests.Support.SectionBytes;

namespace Vmm.Tests.Unit.Core.Devices;

[TestFixture]
public sealed class VmClockTests
{
    private ManualTimeProvider _time = null!;
    private VmClock _clock = null!;
    private int _fired;

    [SetUp]
    public void SetUp()
    {
        _time = new ManualTimeProvider();
        _clock = new VmClock(time: _time);
        _fired = 0;
    }

    [Test]
    public void TimePassesOnlyWhileTheVmRuns()
    {
        _time.Advance(TimeSpan.FromSeconds(1));
        Assert.That((_clock.NowNs, _clock.NowTicks), Is.EqualTo((0L, 0L)));
        Start();
        _time.Advance(TimeSpan.FromMilliseconds(3));
        Assert.That((_clock.NowNs, _clock.NowTicks), Is.EqualTo((3_000_000L, 3_000_000L)));
        Stop();
        _time.Advance(TimeSpan.FromSeconds(1));
        Assert.That(_clock.NowNs, Is.EqualTo(3_000_000));
    }

    [Test]
    public void AMovedClockGoesOnFromWhereItWas()
    {
        Start();
        _time.Advance(TimeSpan.FromMilliseconds(3));
        Stop();
        byte[] body = Save(VmClock.Description, _clock);
        var otherTime = new ManualTimeProvider();
        var other = new VmClock(time: otherTime);
        Load(VmClock.Description, other, body);
        otherTime.Advance(TimeSpan.FromSeconds(9));
        other.OnVmStateChange(true, RunState.Running);
        otherTime.Advance(TimeSpan.FromMilliseconds(2));
        Assert.That((other.NowNs, other.NowTicks), Is.EqualTo((5_000_000L, 5_000_000L)));
    }

    [Test]
    public void SavingARunningClockSavesNow()
    {
        Start();
        _time.Advance(TimeSpan.FromMilliseconds(1));
        Assert.That(Save(VmClock.Description, _clock), Is.EqualTo(Hex("00000000000f4240 0000000000000000 00000000000f4240")));
        _time.Advance(TimeSpan.FromMilliseconds(1));
        Assert.That(_clock.NowNs, Is.EqualTo(2_000_000));
    }

    [Test]
    public void ATimerFiresOnceAtItsExpiry()
    {
        using VmTimer timer = _clock.CreateTimer(() => _fired++);
        Start();
        timer.Mod(5_000_000);
        _time.Advance(TimeSpan.FromMilliseconds(4));
        Assert.That((_fired, timer.IsPending), Is.EqualTo((0, true)));
        _time.Advance(TimeSpan.FromMilliseconds(1));
        Assert.That((_fired, timer.IsPending, timer.ExpiryNs), Is.EqualTo((1, false, -1L)));
        _time.Advance(TimeSpan.FromSeconds(1));
        Assert.That(_fired, Is.EqualTo(1));
    }

    [Test]
    public void ATimerWaitsForAStoppedVm()
    {
        using VmTimer timer = _clock.CreateTimer(() => _fired++);
        timer.Mod(5_000_000);
        _time.Advance(TimeSpan.FromSeconds(1));
        Start();
        _time.Advance(TimeSpan.FromMilliseconds(4));
        Stop();
        _time.Advance(TimeSpan.FromSeconds(1));
        Assert.That(_fired, Is.Zero);
        Start();
        _time.Advance(TimeSpan.FromMilliseconds(1));
        Assert.That(_fired, Is.EqualTo(1));
    }

    [Test]
    public void ADistantTimerIsWaitedForInTurns()
    {
        using VmTimer timer = _clock.CreateTimer(() => _fired++);
        Start();
        timer.Mod((long)TimeSpan.FromHours(100).TotalNanoseconds);
        _time.Advance(TimeSpan.FromHours(99));
        Assert.That(_fired, Is.Zero);
        _time.Advance(TimeSpan.FromHours(1));
        Assert.That(_fired, Is.EqualTo(1));
    }

    [Test]
    public void DeletedAndDisposedTimersNeverFire()
    {
        using VmTimer deleted = _clock.CreateTimer(() => _fired++);
        VmTimer disposed = _clock.CreateTimer(() => _fired++);
        Start();
        deleted.Mod(1);
        disposed.Mod(1);
        deleted.Del();
        disposed.Dispose();
        _time.Advance(TimeSpan.FromSeconds(1));
        Assert.That(_fired, Is.Zero);
    }

    [Test]
    public void TheCallbackHasTheBql()
    {
        var bql = new Bql();
        var clock = new VmClock(bql, _time);
        bool held = false;
        using VmTimer timer = clock.CreateTimer(() => held = bql.IsHeld);
        clock.OnVmStateChange(true, RunState.Running);
        timer.Mod(1_000_000);
        _time.Advance(TimeSpan.FromMilliseconds(1));
        Assert.That(held, Is.True);
    }

    [Test]
    public void ATimerFiresByTheSystemsClockToo()
    {
        using var fired = new ManualResetEventSlim();
        var clock = new VmClock();
        using VmTimer timer = clock.CreateTimer(fired.Set);
        clock.OnVmStateChange(true, RunState.Running);
        using (clock.Bql.Acquire()) timer.Mod(clock.NowNs + 1_000_000);
        Assert.That(fired.Wait(TimeSpan.FromSeconds(30)), Is.True);
    }

    private void Start() => _clock.OnVmStateChange(true, RunState.Running);

    private void Stop() => _clock.OnVmStateChange(false, RunState.Paused);
}
