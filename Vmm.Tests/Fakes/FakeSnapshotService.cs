using Vmm.Core.Errors;
using Vmm.Migration.Snapshot;

namespace Vmm.Tests.Fakes;

/// <summary>Keeps snapshots in a list; <see cref="Hold"/> makes a save wait for <see cref="Release"/> or a cancel.</summary>
internal sealed class FakeSnapshotService : ISnapshotService
{
    private readonly List<SnapshotManifest> _list = [];

    internal ManualResetEventSlim Release { get; } = new();
    internal ManualResetEventSlim Entered { get; } = new();
    internal bool Hold { get; set; }
    internal Action? Saving { get; set; }
    internal string? Failure { get; set; }
    internal List<string> Calls { get; } = [];

    public string Location => "memory";

    public SnapshotManifest Save(string name, bool overwrite, Action<long, long>? progress, CancellationToken cancel)
    {
        Calls.Add($"save {name} {overwrite}");
        progress?.Invoke(50, 100);
        Entered.Set();
        Saving?.Invoke();
        if (Hold) Release.Wait(cancel);
        if (Failure is not null) throw new ConfigurationException(Failure);
        Delete(name);
        var manifest = new SnapshotManifest
        {
            Name = name, CreatedUtc = DateTimeOffset.UnixEpoch.AddDays(1), Machine = "none", StreamBytes = 101 << 20, RamBytes = 256 << 20,
            VmClockNs = 3_723_026_000_000, Checksum = "sha256:0", RunState = "running",
        };
        _list.Add(manifest);
        progress?.Invoke(100, 100);
        return manifest;
    }

    public void Load(string name, Action<long, long>? progress, CancellationToken cancel) => Calls.Add($"load {name}");

    public bool Delete(string name) => _list.RemoveAll(s => s.Name == name) > 0;

    public IReadOnlyList<SnapshotManifest> List() => [.. _list];
}
