using Microsoft.Extensions.Logging.Abstractions;
using Vmm.Core.Interop;
using Vmm.Core.Threading;
using Vmm.Tests.Support;

namespace Vmm.Tests.Unit.Core.Threading;

[TestFixture]
public sealed class EventFdLoopTests
{
    [Test]
    public void HandlersRunUntilTheyAreRemoved()
    {
        using var loop = new EventFdLoop(NullLoggerFactory.Instance);
        using OwnedFd a = Posix.EventFd(), b = Posix.EventFd();
        int countA = 0, countB = 0;
        IDisposable first = loop.Add(a, () => { Posix.DrainEventFd(a); Interlocked.Increment(ref countA); });
        using IDisposable second = loop.Add(b, () => { Posix.DrainEventFd(b); Interlocked.Increment(ref countB); });
        Posix.SignalEventFd(a);
        LeakCheck.WaitFor(() => Volatile.Read(ref countA) == 1, "the first handler did not run");
        first.Dispose();
        Posix.SignalEventFd(a);
        Posix.SignalEventFd(b);
        LeakCheck.WaitFor(() => Volatile.Read(ref countB) == 1, "the second handler did not run");
        Assert.That(countA, Is.EqualTo(1));
    }

    [Test]
    public void AHandlerThatThrowsIsCalledNoMoreAndHurtsNobody()
    {
        using var loop = new EventFdLoop(NullLoggerFactory.Instance);
        using OwnedFd bad = Posix.EventFd(), good = Posix.EventFd();
        int calls = 0, count = 0;
        using IDisposable first = loop.Add(bad, () => { Interlocked.Increment(ref calls); throw new InvalidOperationException("test"); });
        using IDisposable second = loop.Add(good, () => { Posix.DrainEventFd(good); Interlocked.Increment(ref count); });
        Posix.SignalEventFd(bad);
        LeakCheck.WaitFor(() => Volatile.Read(ref calls) == 1, "the bad handler did not run");
        Posix.SignalEventFd(bad);
        Posix.SignalEventFd(good);
        LeakCheck.WaitFor(() => Volatile.Read(ref count) == 1, "the good handler did not run");
        Assert.That(calls, Is.EqualTo(1));
    }

    [Test]
    public void AHandlerMayRemoveItself()
    {
        using var loop = new EventFdLoop(NullLoggerFactory.Instance);
        using OwnedFd fd = Posix.EventFd();
        int calls = 0;
        IDisposable? self = null;
        self = loop.Add(fd, () => { self!.Dispose(); Interlocked.Increment(ref calls); });
        Posix.SignalEventFd(fd);
        LeakCheck.WaitFor(() => Volatile.Read(ref calls) == 1, "the handler did not run");
    }

    [Test]
    public void AfterDisposalNothingIsWatched()
    {
        var loop = new EventFdLoop(NullLoggerFactory.Instance);
        using OwnedFd fd = Posix.EventFd();
        IDisposable registration = loop.Add(fd, static () => { });
        loop.Dispose();
        loop.Dispose();
        Assert.DoesNotThrow(registration.Dispose);
        Assert.Throws<ObjectDisposedException>(() => loop.Add(fd, static () => { }));
    }
}
