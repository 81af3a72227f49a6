using Vmm.Core.Interop;
using Vmm.Core.Kvm;
using Vmm.Core.Memory;

namespace Vmm.Tests.Unit.Kvm;

/// <summary>The test plays the kernel's side of the dirty ring, both within the ring's size and beyond it.</summary>
internal sealed class KvmDirtyRingTests
{
    private const int Entries = 64;
    private const uint Dirty = 1, Reset = 2;

    private MappedRegion _memory = null!;
    private KvmDirtyRing _ring = null!;
    private ulong _pushed, _reset; // The kernel's two indices.
    private readonly HashSet<ulong> _seen = [];

    [SetUp]
    public void SetUp()
    {
        using OwnedFd fd = Posix.MemFd("ring", 4096);
        _memory = MappedRegion.Map(fd, 4096, shared: true, 0, "ring");
        _ring = new KvmDirtyRing(_memory, Entries);
        (_pushed, _reset) = (0, 0);
        _seen.Clear();
    }

    [TearDown]
    public void TearDown() => _memory.Dispose();

    [Test]
    public void Entries_are_taken_once_and_in_order_however_often_the_ring_goes_round([Values(1, 7, 63)] int atATime)
    {
        for (int round = 0; round < 30; round++)
        {
            ulong first = _pushed;
            Push(atATime);
            Assert.That(Drain(), Is.True);
            Assert.That(_seen.Order(), Is.EqualTo(Enumerable.Range(0, atATime).Select(i => first + (ulong)i)));
            _seen.Clear();
        }
        Assert.That(Drain(), Is.True, "an empty ring has no overrun");
        Assert.That(_seen, Is.Empty);
    }

    [Test]
    public void A_kernel_that_runs_past_the_end_is_noticed_and_caught_up_with([Values(64, 65, 70, 100)] int pushed)
    {
        Push(3);
        Drain();
        Push(pushed);
        Assert.That(Drain(), Is.False, "the kernel may have overwritten entries");
        for (int round = 0; round < 20; round++)
        {
            _seen.Clear();
            ulong first = _pushed;
            Push(5);
            Assert.That(Drain(), Is.True);
            Assert.That(_seen.Order(), Is.EqualTo(Enumerable.Range(0, 5).Select(i => first + (ulong)i)), $"round {round}");
        }
        Assert.That(_reset, Is.EqualTo(_pushed), "the kernel has all its entries back");
    }

    [Test]
    public void A_second_overrun_before_the_gap_was_passed_is_noticed_too()
    {
        Push(70);
        Assert.That(Drain(), Is.False);
        Push(80);
        Assert.That(Drain(), Is.False);
        _seen.Clear();
        ulong first = _pushed;
        Push(10);
        Assert.That(Drain(), Is.True);
        Assert.That(_seen, Is.SupersetOf(Enumerable.Range(0, 10).Select(i => first + (ulong)i)));
    }

    private bool Drain()
    {
        bool ok = true;
        while (true)
        {
            int taken = _ring.Take((slot, page) =>
            {
                Assert.That(slot, Is.EqualTo(7));
                _seen.Add(page);
            });
            if (taken == 0) return ok;
            if (_ring.Reset(taken, KernelReset())) return ok;
            ok = false;
        }
    }

    private void Push(int count)
    {
        for (int i = 0; i < count; i++, _pushed++)
        {
            ulong at = _pushed % Entries * 16;
            _memory.TryWriteIo(at + 4, 4, 7);
            _memory.TryWriteIo(at + 8, 8, _pushed);
            _memory.TryWriteIo(at, 4, Dirty);
        }
    }

    /// <summary>Resets entries as the kernel does: in order, up to the first entry that was not given back.</summary>
    private int KernelReset()
    {
        int count = 0;
        while (true)
        {
            ulong at = _reset % Entries * 16;
            _memory.TryReadIo(at, 4, out ulong flags);
            if ((flags & Reset) == 0) return count;
            _memory.TryWriteIo(at, 4, 0);
            _reset++;
            count++;
        }
    }
}
