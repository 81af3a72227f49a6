using System.Buffers.Binary;
using Vmm.Core.Memory;
using Iced.Intel;
using static Iced.Intel.AssemblerRegisters;

namespace Vmm.Tests.Unit.Kvm;

/// <summary>The dirty log has every page that the guest wrote, whatever happens to the memory slots meanwhile.</summary>
internal sealed class KvmDirtyLogTests
{
    private const ulong Counter = 0x180000, First = 0x200000, MemoryBytes = 6 << 20;

    /// <summary>Logs by bitmap, by a ring with room for all writes, and by a ring so small that the guest keeps filling it.</summary>
    [Test]
    public void No_page_that_the_guest_wrote_is_missed_while_slots_come_and_go([Values(1, 2, 3)] int seed, [Values(0, 65536, 1024)] int dirtyRingEntries)
    {
        using var guest = new KvmGuest(RandomWriter(seed), MemoryBytes, dirtyRingEntries: dirtyRingEntries);
        RamBlock ram = guest.Test.Ram;
        using var extra = new RamBlock(new RamBlockOptions { Name = "extra", SizeBytes = 64 << 10 }, new GuestAddress(0x1000_0000));
        var random = new Random(seed);
        byte[] before = ram.ReadOnlySlice(0, (int)MemoryBytes).ToArray();
        using (guest.Vm.Bql.Acquire()) guest.Vm.Memory.StartDirtyLog();
        bool isAdded = false;
        long changed = 0;
        for (int round = 0; round < 12; round++)
        {
            guest.Vm.Cont();
            // The two parts of a round run with different slots, so slot numbers change while marks wait in the kernel.
            WaitForSteps(guest, random.Next(50, 2500));
            using (guest.Vm.Bql.Acquire())
            {
                if (isAdded) guest.Kvm.Vm.RemoveSlot(extra.Range);
                else guest.Kvm.Vm.AddSlot(extra.Range, extra.HostAddress, isReadOnly: false, isRam: true);
                isAdded = !isAdded;
            }
            var marks = new DirtyBitmap(ram.PageCount);
            if (random.Next(2) == 0)
                using (guest.Vm.Bql.Acquire()) guest.Vm.Memory.HarvestDirtyLog(ram, marks);
            WaitForSteps(guest, random.Next(50, 500));
            guest.Vm.Stop();
            using (guest.Vm.Bql.Acquire()) guest.Vm.Memory.HarvestDirtyLog(ram, marks);
            byte[] now = ram.ReadOnlySlice(0, (int)MemoryBytes).ToArray();
            for (int page = 0; page < ram.PageCount; page++)
            {
                if (now.AsSpan(page * 4096, 4096).SequenceEqual(before.AsSpan(page * 4096, 4096))) continue;
                changed++;
                Assert.That(marks.IsSet(page), $"round {round}: page {page} changed and is not marked");
            }
            before = now;
        }
        using (guest.Vm.Bql.Acquire()) guest.Vm.Memory.StopDirtyLog();
        if (guest.Kvm.Rings is { } rings)
        {
            TestContext.Out.WriteLine($"{rings.Entries} entries, {rings.Overruns} overruns, {changed} changed pages");
            Assert.That(rings.Entries, Is.GreaterThan(changed / 2), "the kernel used the ring");
            if (dirtyRingEntries == 65536) Assert.That(rings.Overruns, Is.Zero, "a ring with room for all writes never overruns");
        }
        Assert.That(changed, Is.GreaterThan(500), "the guest wrote to its memory");
    }

    private static void WaitForSteps(KvmGuest guest, int steps)
    {
        ulong from = Steps(guest);
        KvmGuest.WaitFor(() => guest.Kvm.Failure is not null || Steps(guest) - from >= (ulong)steps, $"{steps} writes");
        Assert.That(guest.Kvm.Failure, Is.Null);
    }

    private static ulong Steps(KvmGuest guest) => BinaryPrimitives.ReadUInt64LittleEndian(guest.Test.Ram.ReadOnlySlice(Counter, 8));

    /// <summary>A guest that writes to pages in a pseudo-random order for ever.</summary>
    private static byte[] RandomWriter(int seed) => KvmGuest.Code(a =>
    {
        Label next = a.CreateLabel();
        a.mov(rbx, Counter);
        a.mov(rbp, 6364136223846793005);
        a.mov(rax, (long)seed);
        a.Label(ref next);
        a.imul(rax, rbp);
        a.add(rax, 1442695);
        a.mov(rcx, rax);
        a.shr(rcx, 54); // 1024 pages.
        a.shl(rcx, 12);
        a.mov(__qword_ptr[rcx + (int)First], rax);
        a.inc(__qword_ptr[rbx]);
        a.jmp(next);
    });
}
