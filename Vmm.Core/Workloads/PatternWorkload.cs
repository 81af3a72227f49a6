using Vmm.Core.Devices;
using Vmm.Core.Errors;
using Vmm.Core.Memory;
using Vmm.Core.RunStates;
using Vmm.Core.VmStates;

namespace Vmm.Core.Workloads;

/// <summary>
/// A deterministic guest for machines without a CPU. While the VM runs, a thread picks pages in an order that seed and position determine, checks each
/// page and writes its next generation. It records a wrong page and does not overwrite it. All its state is in guest RAM (layout:
/// <c>PatternBlock</c>), so it continues after a migration that carried only RAM; values in RAM override the options. With <c>state=on</c> the
/// section <c>pattern</c> repeats position and checksums, so that even a consistent set of lost pages is found. Blank RAM may be new or lost;
/// <c>expect=on</c> says that the workload has run on it before. A stop returns when the thread is quiet, after at most one page write, or, directly
/// after a start, one pass over the index (about a millisecond per GiB).
/// </summary>
internal sealed class PatternWorkload : IVmDevice, IVmStateHandler, IWorkload
{
    private const int VerifyChunkPages = 4096;

    // Connections to the VM.
    private readonly PatternBlock[] _blocks;
    private readonly ulong _seed;
    private readonly bool _prefill;
    private readonly bool _expect;
    private readonly long _workPages;
    private readonly WorkloadThread _thread;
    private readonly IDisposable _handler;
    private readonly IDisposable? _section;

    // The section's content: what a save writes, and what a load has read.
    private PatternState _saved = new();
    private volatile PatternState? _expected;

    // The workload's thread writes these; any thread reads them.
    private ulong _orderSeed;
    private long _position;
    private long _writes;
    private long _violations;
    private volatile WorkloadViolation? _firstViolation;

    /// <summary>Makes and registers the workload and starts its thread. BQL: held.</summary>
    /// <param name="options">
    /// <c>rate</c> (bytes a second, default 64M, 0 for no limit), <c>seed</c>, <c>block</c> (default: all blocks of at least 3 pages),
    /// <c>state</c> (on or off, default off), <c>working-set</c> (percent of the pages that are written, default 100), <c>prefill</c> (first write every
    /// page once, in order and at full speed; default off), <c>expect</c> (the RAM already holds a workload, as at the destination of a migration; blank
    /// RAM is then a violation and stays blank; default off).
    /// </param>
    /// <param name="services">Services of the device's VM.</param>
    /// <exception cref="ConfigurationException">An option is refused, or the VM has no suitable RAM block.</exception>
    public PatternWorkload(DeviceOptions options, IDeviceServices services)
    {
        ArgumentNullException.ThrowIfNull(options);
        ArgumentNullException.ThrowIfNull(services);
        Id = options.Id;
        _seed = options.GetUInt64("seed", 1);
        _prefill = options.GetBool("prefill", false);
        _expect = options.GetBool("expect", false);
        ulong percent = options.GetUInt64("working-set", 100, 100);
        if (percent == 0) throw new ConfigurationException($"device '{Id}': option 'working-set' expects 1 to 100 percent, found 0");
        ulong rate = options.GetSizeBytes("rate", 64 << 20);
        bool withState = options.GetBool("state", false);
        _blocks = BlocksOf(options.GetString("block", ""), services.Memory);
        _workPages = _blocks.Sum(b => b.SetWorkingSet(percent));
        _section = withState ? services.RegisterVmState(Description, this) : null;
        _thread = new WorkloadThread($"workload/{Id}", rate == 0 ? 0 : (long)Math.Max(1, rate / RamBlock.PageSize), Attach, Step, IsPrefilling,
            services.Scope.GetService(typeof(CpuThrottle)) as CpuThrottle);
        _handler = services.RunState.Register(this);
        if (services.RunState.State == RunState.Running) _thread.SetRunning(true);
    }

    /// <summary>The section of <c>state=on</c>, which QEMU does not know.</summary>
    public static VmStateDescription<PatternWorkload> Description { get; } = new()
    {
        Name = "pattern", VersionId = 1, MinimumVersionId = 1,
        Fields =
        [
            VmState.UInt64<PatternWorkload>("seed", static d => ref d._saved.Seed),
            VmState.UInt64<PatternWorkload>("position", static d => ref d._saved.Position),
            VmState.UInt64<PatternWorkload>("writes", static d => ref d._saved.Writes),
            VmState.UInt64<PatternWorkload>("generations", static d => ref d._saved.Generations),
        ],
        PreSave = static d => d._saved = d.Summary(),
        PreLoad = static d => d._saved = new PatternState(),
        PostLoad = static (d, _) => d._expected = d._saved,
    };

    /// <inheritdoc/>
    public string Id { get; }

    /// <inheritdoc/>
    public long Writes => Volatile.Read(ref _writes);

    /// <inheritdoc/>
    public long Violations => Volatile.Read(ref _violations);

    /// <inheritdoc/>
    public WorkloadViolation? FirstViolation => _firstViolation;

    /// <inheritdoc/>
    public void OnVmStateChange(bool running, RunState state) => _thread.SetRunning(running);

    /// <inheritdoc/>
    public void Reset()
    {
        // The workload's state is in RAM, which a reset does not change.
    }

    /// <inheritdoc/>
    public WorkloadReport Verify(CancellationToken cancel = default)
    {
        var scan = new Scan(_expect);
        _thread.Paused(() =>
        {
            scan.Add(CheckExpected());
            // A thread that has not had its turn since the VM came here has not read its count yet.
            Volatile.Write(ref _writes, (long)Summary().Writes);
        });
        foreach (PatternBlock block in _blocks)
        {
            bool present = false;
            _thread.Paused(() => present = scan.Head(block));
            for (long page = 0; present && page < block.DataPages; page += VerifyChunkPages)
            {
                cancel.ThrowIfCancellationRequested();
                long from = page, to = Math.Min(page + VerifyChunkPages, block.DataPages);
                _thread.Paused(() => scan.Pages(block, from, to));
            }
        }
        return new WorkloadReport(scan.Checked, scan.Bad, scan.First);
    }

    /// <summary>Ends the thread and removes all registrations. BQL: held.</summary>
    public void Dispose()
    {
        _section?.Dispose();
        _handler.Dispose();
        _thread.Dispose();
    }

    private static PatternBlock[] BlocksOf(string name, GuestMemory memory)
    {
        if (name.Length == 0)
        {
            PatternBlock[] all = [.. memory.Blocks.Where(static b => b.PageCount >= PatternBlock.MinimumPages).Select(static b => new PatternBlock(b))];
            return all.Length > 0 ? all : throw new ConfigurationException("device 'pattern': the VM has no RAM block of at least 3 pages to work on");
        }
        RamBlock block = memory.FindBlock(name)
            ?? throw new ConfigurationException($"device 'pattern': option 'block': no RAM block '{name}'; known: {string.Join(", ", memory.Blocks.Select(static b => b.Name))}");
        return block.PageCount >= PatternBlock.MinimumPages ? [new PatternBlock(block)]
            : throw new ConfigurationException($"device 'pattern': option 'block': RAM block '{name}' has {block.PageCount} pages, {PatternBlock.MinimumPages} are needed");
    }

    /// <summary>Runs on the thread after each start: continues from the state in RAM, or writes a new one.</summary>
    private void Attach()
    {
        if (CheckExpected() is { } lost) Record(lost);
        _expected = null; // After the first write, RAM is newer than the section.
        foreach (PatternBlock block in _blocks)
        {
            if (block.TryAttach())
            {
                long bad = 0;
                if (block.CheckIndex(ref bad) is { } violation) Record(violation);
                continue;
            }
            // A new start would erase the evidence of the loss.
            if (_expect || block.HasIndex()) Record(block.LostRoot());
            else block.Format(_seed, _prefill);
        }
        _orderSeed = _blocks[0].Root.Seed;
        _position = _blocks.Sum(static b => b.Root.Writes + b.Root.Skips);
        Volatile.Write(ref _writes, _blocks.Sum(static b => b.Root.Writes));
    }

    private bool IsPrefilling() => _blocks[0].Root.Prefill && _position < _workPages;

    /// <summary>Checks and writes one page. Runs on the thread.</summary>
    private void Step()
    {
        long pick = IsPrefilling() ? _position : (long)(PatternPage.Mix(_orderSeed + (ulong)_position) % (ulong)_workPages);
        _position++;
        foreach (PatternBlock block in _blocks)
        {
            if (pick >= block.WorkPages) { pick -= block.WorkPages; continue; }
            if (!block.IsAttached) return;
            if (block.Rewrite(pick) is { } violation) Record(violation);
            else Volatile.Write(ref _writes, _writes + 1);
            return;
        }
    }

    private void Record(WorkloadViolation violation)
    {
        _firstViolation ??= violation;
        Volatile.Write(ref _violations, _violations + 1);
    }

    /// <summary>Compares RAM with the section of the same migration. The thread must be quiet, or call this itself.</summary>
    private WorkloadViolation? CheckExpected()
    {
        if (_expected is not { } expected) return null;
        PatternState found = Summary();
        return found == expected ? null : _blocks[0].LostRoot(found.ToString()) with { Expected = $"what section 'pattern' says: {expected}" };
    }

    /// <summary>Computes position and checksums over all blocks from RAM.</summary>
    private PatternState Summary()
    {
        var sum = new PatternState();
        foreach (PatternBlock block in _blocks)
        {
            if (!block.TryAttach()) continue;
            sum.Seed = block.Root.Seed;
            sum.Writes += (ulong)block.Root.Writes;
            sum.Position += (ulong)(block.Root.Writes + block.Root.Skips);
            sum.Generations += block.Root.Generations;
        }
        return sum;
    }

    private sealed record PatternState
    {
        internal ulong Seed;
        internal ulong Position;
        internal ulong Writes;
        internal ulong Generations;

        public override string ToString() => $"seed {Seed}, position {Position}, {Writes} writes, checksum 0x{Generations:x16}";
    }

    /// <summary>Collects the results of one verification.</summary>
    private sealed class Scan(bool expect)
    {
        private long _bad;

        internal long Checked { get; private set; }

        internal long Bad => _bad;

        internal WorkloadViolation? First { get; private set; }

        internal void Add(WorkloadViolation? violation)
        {
            if (violation is null) return;
            _bad++;
            First ??= violation;
        }

        /// <summary>Checks root and index of a block; returns false if no workload has run on it.</summary>
        internal bool Head(PatternBlock block)
        {
            if (!block.TryAttach())
            {
                if (expect || block.HasIndex()) Add(block.LostRoot());
                return false;
            }
            Checked += block.PageCount;
            WorkloadViolation? violation = block.CheckIndex(ref _bad);
            First ??= violation;
            return true;
        }

        internal void Pages(PatternBlock block, long from, long to)
        {
            for (long page = from; page < to; page++) Add(block.Check(page));
        }
    }
}

/// <summary>Makes <see cref="PatternWorkload"/>s.</summary>
internal sealed class PatternWorkloadFactory : IDeviceFactory
{
    /// <inheritdoc/>
    public string TypeName => "pattern";

    /// <inheritdoc/>
    public string Summary => "a guest that dirties RAM at a rate and verifies every page it wrote";

    /// <inheritdoc/>
    public IReadOnlyList<IVmStateDescription> Descriptions => [PatternWorkload.Description];

    /// <inheritdoc/>
    public IVmDevice Create(DeviceOptions options, IDeviceServices services) => new PatternWorkload(options, services);
}

/// <summary>Adds the device types <c>pattern</c> (an <see cref="IWorkload"/>), <c>ticker</c> and <c>scratch</c>, which show and check migration without a guest.</summary>
public sealed class WorkloadPlugin : IVmmPlugin
{
    /// <inheritdoc/>
    public void Configure(VmmBuilder builder)
    {
        ArgumentNullException.ThrowIfNull(builder);
        builder.AddDevice<PatternWorkloadFactory>().AddDevice<TickerDeviceFactory>().AddDevice<ScratchDeviceFactory>();
    }
}
