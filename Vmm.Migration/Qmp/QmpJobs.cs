using System.Text.Json.Nodes;
using Vmm.Core.Errors;
using Vmm.Core.Threading;
using Vmm.Migration.Snapshot;

namespace Vmm.Migration.Qmp;

/// <summary>Snapshot jobs (qmp 9): each runs on a thread of its own and stays listed until it is dismissed. Thread-safe.</summary>
internal sealed class QmpJobs(QmpServer server, ISnapshotService? snapshots) : IAsyncDisposable
{
    private readonly Lock _gate = new();
    private readonly Dictionary<string, Job> _jobs = [];
    private bool _disposed;

    private sealed class Job(string id, string type)
    {
        internal string Id => id;
        internal string Type => type;
        internal string Status { get; set; } = "undefined";
        internal long Done { get; set; }
        internal long Total { get; set; } = 1;
        internal string? Error { get; set; }
        internal CancellationTokenSource Cancel { get; } = new();
        internal Task Running { get; set; } = Task.CompletedTask;
    }

    internal IEnumerable<QmpCommand> Commands()
    {
        var id = new QmpObject(new QmpMember("id", QmpType.Str));
        QmpMember jobId = new("job-id", QmpType.Str), tag = new("tag", QmpType.Str), devices = new("devices", new QmpArray(QmpType.Str));
        var saveOrLoad = new QmpObject(jobId, tag, new("vmstate", QmpType.Str), devices);
        var info = new QmpObject(new("id", QmpType.Str), new("type", new QmpEnum("snapshot-save", "snapshot-load", "snapshot-delete")),
            new("status", QmpEvents.JobStatus), new("current-progress", QmpType.Int), new("total-progress", QmpType.Int), new("error", QmpType.Str, true));
        yield return new("snapshot-save", saveOrLoad, QmpObject.Empty, c => Start(c, "snapshot-save"));
        yield return new("snapshot-load", saveOrLoad, QmpObject.Empty, c => Start(c, "snapshot-load"));
        yield return new("snapshot-delete", new(jobId, tag, devices), QmpObject.Empty, c => Start(c, "snapshot-delete"));
        yield return new("query-jobs", QmpObject.Empty, new QmpArray(info), Query);
        yield return new("job-cancel", id, QmpObject.Empty, Cancel);
        yield return new("job-dismiss", id, QmpObject.Empty, Dismiss);
    }

    /// <summary>Cancels the running jobs and waits for them.</summary>
    public async ValueTask DisposeAsync()
    {
        Job[] jobs;
        lock (_gate)
        {
            _disposed = true;
            jobs = [.. _jobs.Values];
            _jobs.Clear();
        }
        foreach (Job job in jobs) job.Cancel.Cancel();
        foreach (Job job in jobs)
        {
            await job.Running.ConfigureAwait(false);
            job.Cancel.Dispose();
        }
    }

    private JsonNode? Start(QmpCall call, string type)
    {
        string id = call.Str("job-id"), tag = call.Str("tag");
        string? vmstate = call.TryStr("vmstate");
        string[] devices = [.. call.Array("devices").Select(static d => d!.GetValue<string>())];
        if (id.Length == 0 || !char.IsAsciiLetter(id[0]) || !id.All(static c => char.IsAsciiLetterOrDigit(c) || c is '-' or '.' or '_'))
            throw new QmpErrorException($"Invalid job ID '{id}'");
        var job = new Job(id, type);
        lock (_gate)
        {
            ObjectDisposedException.ThrowIf(_disposed, this);
            if (!_jobs.TryAdd(id, job)) throw new QmpErrorException($"Job ID '{id}' already in use");
            Move(job, "created");
            Move(job, "running");
            job.Running = WorkerThread.Run("qmp-job", () => Run(job, tag, vmstate, devices));
        }
        return null;
    }

    private void Run(Job job, string tag, string? vmstate, string[] devices)
    {
        using QmpServer.WorkScope work = server.EnterWork();
        try
        {
            Perform(job, tag, vmstate, devices);
            lock (_gate)
            {
                if (job.Done < job.Total) job.Done = job.Total;
                Move(job, "waiting");
                Move(job, "pending");
                Move(job, "concluded");
            }
            return;
        }
        catch (OperationCanceledException)
        {
            job.Error = "Operation canceled";
        }
        catch (VmmException e)
        {
            job.Error = VmmException.Describe(e);
        }
#pragma warning disable CA1031 // A fault in a job must not end the process; it becomes the job's error and is logged.
        catch (Exception e)
#pragma warning restore CA1031
        {
            server.Log.CommandFault(e);
            job.Error = $"internal error: {VmmException.Describe(e)}";
        }
        lock (_gate)
        {
            Move(job, "aborting");
            Move(job, "concluded");
        }
    }

    private void Perform(Job job, string tag, string? vmstate, string[] devices)
    {
        if (devices.Length == 0) throw new QmpErrorException("At least one device is required for snapshot");
        if (vmstate is not null && (snapshots is null || vmstate != QmpServer.SnapshotNodeName))
            throw new QmpErrorException($"vmstate block device '{vmstate}' does not exist");
        if (snapshots is null || Array.Find(devices, static d => d != QmpServer.SnapshotNodeName) is not null)
            throw new QmpErrorException($"No block device node '{Array.Find(devices, d => snapshots is null || d != QmpServer.SnapshotNodeName)}'");
        bool exists = snapshots.List().Any(s => s.Name == tag);
        switch (job.Type)
        {
            case "snapshot-save":
                if (exists) throw new QmpErrorException($"Snapshot '{tag}' already exists in one or more devices");
                snapshots.Save(tag, overwrite: false, (done, total) => Progress(job, done, total), job.Cancel.Token);
                break;
            case "snapshot-load":
                if (!exists) throw new QmpErrorException($"Snapshot '{tag}' does not exist in one or more devices");
                snapshots.Load(tag, (done, total) => Progress(job, done, total), job.Cancel.Token);
                break;
            default:
                // As in QEMU, deleting a snapshot that does not exist succeeds.
                snapshots.Delete(tag);
                break;
        }
    }

    // Progress never goes back, whatever the service reports; the total grows while the guest dirties RAM.
    private void Progress(Job job, long done, long total)
    {
        lock (_gate)
        {
            job.Total = Math.Max(Math.Max(total, done), 1);
            job.Done = Math.Max(job.Done, done);
        }
    }

    private JsonArray Query(QmpCall call)
    {
        var result = new JsonArray();
        lock (_gate)
        {
            foreach (Job job in _jobs.Values)
            {
                var one = new JsonObject
                {
                    ["current-progress"] = job.Done, ["status"] = job.Status, ["total-progress"] = Math.Max(job.Total, job.Done), ["type"] = job.Type,
                    ["id"] = job.Id,
                };
                if (job.Status == "concluded" && job.Error is not null) one["error"] = job.Error;
                result.Add((JsonNode)one);
            }
        }
        return result;
    }

    private JsonNode? Cancel(QmpCall call)
    {
        lock (_gate)
        {
            Job job = Find(call);
            if (job.Status != "running") throw Refused(job, "cancel");
            job.Cancel.Cancel();
        }
        return null;
    }

    private JsonNode? Dismiss(QmpCall call)
    {
        lock (_gate)
        {
            Job job = Find(call);
            if (job.Status != "concluded") throw Refused(job, "dismiss");
            _jobs.Remove(job.Id);
            Move(job, "null");
            job.Cancel.Dispose();
        }
        return null;
    }

    private Job Find(QmpCall call) => _jobs.GetValueOrDefault(call.Str("id")) ?? throw new QmpErrorException("Job not found");

    private static QmpErrorException Refused(Job job, string verb) => new($"Job '{job.Id}' in state '{job.Status}' cannot accept command verb '{verb}'");

    // The caller holds the gate, so that events come in the order of the states. Sending an event never waits.
    private void Move(Job job, string status)
    {
        job.Status = status;
        server.Broadcast("JOB_STATUS_CHANGE", new JsonObject { ["status"] = status, ["id"] = job.Id });
    }
}
