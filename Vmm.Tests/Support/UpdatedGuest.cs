using System.Text.Json.Nodes;
using Vmm.Core.Devices;
using Vmm.Core.Memory;
using Vmm.Core.Workloads;
using Vmm.Tools.Cli.Guests;
using Vmm.Tools.Cli.Shell;

namespace Vmm.Tests.Support;

/// <summary>A guest that keeps a VM busy during updates. It writes what it observes to its RAM, where the test reads it.</summary>
internal abstract class UpdatedGuest
{
    /// <summary>The option text of the first RAM block, which has the function's DMA pages: edu reaches only 256 MiB.</summary>
    internal required string FirstBlock { get; init; }

    /// <summary>Further arguments of <c>vmm run</c>.</summary>
    internal required IReadOnlyList<string> Arguments { get; init; }

    /// <summary>The socket of the served edu function; null when there is none.</summary>
    internal string? Device { get; init; }

    internal required ulong RamBytes { get; init; }

    /// <summary>Count of the VM's stops so far; the test sets it.</summary>
    internal long Stops { get; set; }

    /// <summary>Reads what the guest has observed, and fails the test when a page differed.</summary>
    internal abstract Task<Seen> Look(IMonitor monitor, string file);

    /// <summary>Waits until the guest has written all RAM.</summary>
    internal abstract Task WaitFilled(IMonitor monitor, string file, CancellationToken cancel);

    /// <summary>Checks all RAM once more.</summary>
    internal abstract Task Verify(IMonitor monitor, string file, CancellationToken cancel);

    /// <param name="StopGapMs">The jump of the guest's clock at the last stop.</param>
    /// <param name="Interrupts">Count of the function's interrupts. Each starts the next transfer.</param>
    internal readonly record struct Seen(double StopGapMs, long Interrupts);

    /// <summary>Repeats a read until the guest has noticed every stop, which it does when it next reads its clock.</summary>
    private protected async Task<T> Stopped<T>(Func<Task<T>> look, Func<T, long> stops)
    {
        using var limit = new CancellationTokenSource(VmmCommands.Deadline);
        while (true)
        {
            T found = await look();
            if (stops(found) >= Stops) return found;
            Assert.That(limit.IsCancellationRequested, Is.False, $"the guest noticed {stops(found)} of {Stops} stops");
        }
    }

    protected static async Task<byte[]> Read(IMonitor monitor, ulong address, int bytes, string file)
    {
        await monitor.Execute("pmemsave", new JsonObject { ["val"] = address, ["size"] = bytes, ["filename"] = file }, CancellationToken.None);
        return await File.ReadAllBytesAsync(file);
    }

    /// <summary>A guest without a vCPU: a workload that rewrites RAM, a ticker, and an edu guest, all inside the VMM.</summary>
    internal static UpdatedGuest Synthetic(ulong ramMiB, string? device) => new SyntheticGuest
    {
        FirstBlock = "1M,id=edu", RamBytes = ramMiB << 20, Device = device,
        Arguments =
        [
            "--memory", $"{ramMiB}M,id=ram", "--memory", "1M,id=ticks", "--workload", "pattern,block=ram,rate=64M,prefill=on,state=on", "--device", "ticker",
            .. device is null ? (string[])[] : ["--device", $"vfio-user-pci,id=dev0,socket={device}", "--device", "edu-guest"],
        ],
    };

    /// <summary>A guest with a vCPU that rewrites and checks RAM and drives the function.</summary>
    internal static UpdatedGuest Kvm(ulong ramMiB, string? device)
    {
        ulong below = Math.Min(ramMiB, 3072);
        return new KvmBusyGuest
        {
            FirstBlock = $"{below}M,id=ram", RamBytes = ramMiB << 20, Device = device,
            Arguments =
            [
                .. ramMiB > below ? (string[])["--memory", $"{ramMiB - below}M,id=high"] : [], "--accel", "kvm", "--kernel", "builtin:busy",
                .. device is null ? (string[])[] : ["--device", $"vfio-user-pci,id=dev0,socket={device}"],
            ],
        };
    }

    private sealed class SyntheticGuest : UpdatedGuest
    {
        private const ulong AlignBytes = 2 << 20;
        private ulong TicksAddress => AlignBytes + ((RamBytes + AlignBytes - 1) / AlignBytes * AlignBytes);

        private ulong RootAddress => AlignBytes + RamBytes - RamBlock.PageSize;

        internal override async Task<Seen> Look(IMonitor monitor, string file)
        {
            long[] ticker = await Stopped(async () => Words(await Read(monitor, TicksAddress, 40, file)), static t => t[TickerDevice.StopsOffset / 8]);
            long[] edu = Words(await Read(monitor, 0, 16, file));
            Assert.That(edu[1], Is.Zero, "the edu function returned wrong data in some pages");
            return new Seen(ticker[TickerDevice.StopGapOffset / 8] / 1e6, edu[0]);
        }

        internal override async Task WaitFilled(IMonitor monitor, string file, CancellationToken cancel)
        {
            // Read the workload's counters, because a verification would delay the workload and touch each page before the guest does.
            while (true)
            {
                long[] root = Words(await Read(monitor, RootAddress, PatternRoot.SizeBytes, file));
                if (root[PatternRoot.DataPagesWord] is > 0 and var pages && root[PatternRoot.WritesWord] >= pages) return;
                cancel.ThrowIfCancellationRequested();
            }
        }

        internal override async Task Verify(IMonitor monitor, string file, CancellationToken cancel)
        {
            await monitor.Execute("stop", null, cancel);
            JsonNode verified = await Verified(monitor, cancel);
            Assert.That((verified["bad-pages"]!.GetValue<long>(), verified["violations"]!.GetValue<long>()), Is.EqualTo((0L, 0L)), verified.ToJsonString());
            Assert.That(verified["pages-checked"]!.GetValue<long>(), Is.EqualTo((long)RamBytes / 4096));
        }

        private static async Task<JsonNode> Verified(IMonitor monitor, CancellationToken cancel) => (await monitor.Execute("__io.github.vmm_workload-verify", null, cancel))!;

        private static long[] Words(byte[] bytes) => [.. Enumerable.Range(0, bytes.Length / 8).Select(i => BitConverter.ToInt64(bytes, i * 8))];
    }

    private sealed class KvmBusyGuest : UpdatedGuest
    {
        internal override async Task<Seen> Look(IMonitor monitor, string file)
        {
            BusyGuest.Found found = await Stopped(() => State(monitor, file), static f => f.Stops);
            return new Seen(found.StopGapNs / 1e6, (long)found.Interrupts);
        }

        internal override Task WaitFilled(IMonitor monitor, string file, CancellationToken cancel) => Rounds(monitor, file, 1, cancel);

        internal override Task Verify(IMonitor monitor, string file, CancellationToken cancel) => Rounds(monitor, file, 2, cancel);

        /// <summary>Waits until the guest has begun this many more rounds.</summary>
        private static async Task Rounds(IMonitor monitor, string file, ulong more, CancellationToken cancel)
        {
            ulong begun = (await State(monitor, file)).Rounds;
            while ((await State(monitor, file)).Rounds < begun + more) cancel.ThrowIfCancellationRequested();
        }

        private static async Task<BusyGuest.Found> State(IMonitor monitor, string file)
        {
            BusyGuest.Found found = BusyGuest.Found.Of(await Read(monitor, BusyGuest.StateAddress, BusyGuest.StateBytes, file));
            Assert.That((found.Errors, found.FirstBad, found.BackSteps, found.WrongPages), Is.EqualTo((0ul, 0ul, 0ul, 0ul)), "words that are not what the guest wrote, the first, steps back of its clock, wrong pages of the function");
            return found;
        }
    }
}
