using System.Diagnostics;
using Vmm.Core.RunStates;
using Vmm.Core.Workloads;

namespace Vmm.Tests.Unit.Core.RunStates;

/// <summary>A throttled guest sleeps for a share of its time, and goes on at once when the throttle ends or the VM stops.</summary>
[TestFixture]
public sealed class CpuThrottleTests
{
    private static readonly TimeSpan s_deadline = TimeSpan.FromSeconds(30);

    [TestCase(0, 0)]
    [TestCase(20, 2.5)]
    [TestCase(50, 10)]
    [TestCase(99, 990)]
    public void TheSleepIsTheShareOfTheWhole(int percent, double expectedMs) => Assert.That(CpuThrottle.SleepMs(percent), Is.EqualTo(expectedMs).Within(1e-9));

    [TestCase(-1, 0)]
    [TestCase(100, 99)]
    public void TheShareStaysBetween0And99(int percent, int expected)
    {
        var throttle = new CpuThrottle();
        throttle.Set(percent);
        Assert.That(throttle.Percent, Is.EqualTo(expected));
    }

    [Test]
    public void AHandlerHearsOfEveryChangeUntilItIsDisposed()
    {
        var throttle = new CpuThrottle();
        var heard = new List<int>();
        using (throttle.OnChange(() => heard.Add(throttle.Percent)))
        {
            throttle.Set(20);
            throttle.Set(0);
        }
        throttle.Set(30);
        Assert.That(heard, Is.EqualTo((int[])[20, 0]));
    }

    [TestCase(2.5)]
    [TestCase(0.1)]
    [TestCase(990)]
    public void WholeMillisecondsAreExactOnAverage(double wantedMs)
    {
        var debt = new ThrottleDebt();
        double waited = 0;
        for (int i = 0; i < 1000; i++)
        {
            int ms = debt.Begin(wantedMs);
            // The host wakes a thread a little late.
            double really = ms == 0 ? 0 : ms + 0.3;
            debt.End(really);
            waited += really;
        }
        Assert.That(waited, Is.EqualTo(1000 * wantedMs).Within(2));
    }

    [Test]
    public void AThrottledWorkloadKeepsToItsShare()
    {
        var throttle = new CpuThrottle();
        long steps = 0;
        using var thread = new WorkloadThread("test/workload", 100_000, static () => { }, () => Interlocked.Increment(ref steps), static () => false, throttle);
        throttle.Set(90);
        thread.SetRunning(true);
        Assert.That(SpinWait.SpinUntil(() => Interlocked.Read(ref steps) > 0, s_deadline));
        long start = Stopwatch.GetTimestamp(), before = Interlocked.Read(ref steps);
        Assert.That(SpinWait.SpinUntil(() => Interlocked.Read(ref steps) - before > 5000, s_deadline), "it goes on");
        double seconds = Stopwatch.GetElapsedTime(start).TotalSeconds;
        // 10,000 steps a second are allowed; the first 10 ms at full speed and a burst come on top.
        Assert.That(seconds, Is.GreaterThan((5000 - 1024 - 1000) / 10_000.0 * 0.7));
    }

    [Test]
    public void ASleepEndsAtOnceWithTheThrottleAndWithTheVm()
    {
        var throttle = new CpuThrottle();
        long steps = 0;
        using var thread = new WorkloadThread("test/workload", 0, static () => { }, () => Interlocked.Increment(ref steps), static () => false, throttle);
        for (int i = 0; i < 4; i++)
        {
            thread.SetRunning(true);
            throttle.Set(99);
            WaitUntilAsleep(() => Interlocked.Read(ref steps));
            long asleep = Interlocked.Read(ref steps), start = Stopwatch.GetTimestamp();
            if (i % 2 == 0)
            {
                throttle.Set(0);
                Assert.That(SpinWait.SpinUntil(() => Interlocked.Read(ref steps) > asleep, s_deadline));
            }
            thread.SetRunning(false);
            Assert.That(Stopwatch.GetElapsedTime(start), Is.LessThan(TimeSpan.FromMilliseconds(500)), "a whole sleep takes a second");
        }
    }

    private static void WaitUntilAsleep(Func<long> steps)
    {
        // A thread that is awake counts all the time.
        long at = Stopwatch.GetTimestamp(), last = -1;
        Assert.That(SpinWait.SpinUntil(() =>
        {
            long now = steps();
            if (now == last && now > 0) return Stopwatch.GetElapsedTime(at) > TimeSpan.FromMilliseconds(100);
            (last, at) = (now, Stopwatch.GetTimestamp());
            return false;
        }, s_deadline), "asleep");
    }
}
