using System.Globalization;
using System.Text.Json.Nodes;
using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Core.Wire;

namespace Vmm.Migration.Qmp;

/// <summary>
/// Descriptors that clients passed (qmp 11): named ones belong to their client, fd sets to the VM. Thread-safe.
/// </summary>
internal sealed class QmpFds(Func<IReadOnlyList<QmpSession>> sessions) : IDisposable
{
    private readonly ThreadLocal<QmpSession?> _serving = new();
    private readonly Lock _gate = new();
    private readonly SortedDictionary<long, List<(OwnedFd Fd, string? Opaque)>> _sets = [];

    internal IEnumerable<QmpCommand> Commands()
    {
        var fdname = new QmpObject(new QmpMember("fdname", QmpType.Str));
        yield return new("getfd", fdname, QmpObject.Empty, GetFd) { TakesFd = true };
        yield return new("closefd", fdname, QmpObject.Empty, CloseFd);
        yield return new("add-fd", new(new("fdset-id", QmpType.Int, true), new("opaque", QmpType.Str, true)),
            new QmpObject(new("fdset-id", QmpType.Int), new("fd", QmpType.Int)), AddFd) { TakesFd = true };
        yield return new("remove-fd", new(new("fdset-id", QmpType.Int), new("fd", QmpType.Int, true)), QmpObject.Empty, RemoveFd);
        var fd = new QmpObject(new("fd", QmpType.Int), new("opaque", QmpType.Str, true));
        yield return new("query-fdsets", QmpObject.Empty, new QmpArray(new QmpObject(new("fdset-id", QmpType.Int), new("fds", new QmpArray(fd)))), QueryFdSets);
    }

    /// <summary>Marks the client whose command this thread runs, until the result is disposed. <see cref="TakeNamed"/> prefers that client's names.</summary>
    internal Scope Serving(QmpSession session)
    {
        _serving.Value = session;
        return new Scope(this);
    }

    /// <summary>Removes and returns the descriptor of <c>fd:NAME</c>: the calling client's, else any client's, else null.</summary>
    internal OwnedFd? TakeNamed(string name)
    {
        if (_serving.Value?.TakeNamedFd(name) is { } own) return own;
        foreach (QmpSession session in sessions())
            if (session.TakeNamedFd(name) is { } fd) return fd;
        return null;
    }

    /// <summary>Duplicates the member of <c>/dev/fdset/ID</c> that was opened with exactly this access mode; null if there is none.</summary>
    /// <exception cref="ConfigurationException">There is no such set.</exception>
    internal OwnedFd? OpenSet(long id, int accessMode)
    {
        lock (_gate)
        {
            if (!_sets.TryGetValue(id, out List<(OwnedFd Fd, string? Opaque)>? set)) throw new ConfigurationException($"Failed to find fdset /dev/fdset/{id}");
            OwnedFd? fd = set.Find(f => Posix.AccessMode(f.Fd) == (accessMode & 3)).Fd;
            return fd is null ? null : Posix.Duplicate(fd);
        }
    }

    public void Dispose()
    {
        lock (_gate)
        {
            foreach ((OwnedFd fd, _) in _sets.Values.SelectMany(static s => s)) fd.Dispose();
            _sets.Clear();
        }
        _serving.Dispose();
    }

    private static OwnedFd TheFd(QmpCall call)
    {
        if (call.Fds.Count == 0) throw new QmpErrorException("No file descriptor supplied via SCM_RIGHTS");
        if (call.Fds.Count > 1) throw new QmpErrorException($"{call.Fds.Count} file descriptors supplied via SCM_RIGHTS, expected one");
        return call.Fds[0];
    }

    private static JsonNode? GetFd(QmpCall call)
    {
        OwnedFd fd = TheFd(call);
        string name = call.Str("fdname");
        if (name.Length > 0 && char.IsAsciiDigit(name[0])) throw new QmpErrorException("Parameter 'fdname' expects a name not starting with a digit");
        call.Session.AddNamedFd(name, fd);
        call.Fds.Clear();
        return null;
    }

    private static JsonNode? CloseFd(QmpCall call)
    {
        string name = call.Str("fdname");
        using OwnedFd fd = call.Session.TakeNamedFd(name) ?? throw new QmpErrorException($"File descriptor named '{name}' not found");
        return null;
    }

    private JsonObject AddFd(QmpCall call)
    {
        OwnedFd fd = TheFd(call);
        lock (_gate)
        {
            long id = call.TryInt("fdset-id") ?? FirstFree();
            if (_sets.Values.Sum(static s => s.Count) >= WireLimits.QmpFds)
                throw new QmpErrorException($"the fd sets have {WireLimits.QmpFds} descriptors, and no more are kept (WireLimits.QmpFds)");
            if (id < 0) throw new QmpErrorException("Parameter 'fdset-id' expects a non-negative value");
            if (!_sets.TryGetValue(id, out List<(OwnedFd Fd, string? Opaque)>? set)) _sets.Add(id, set = []);
            set.Insert(0, (fd, call.TryStr("opaque")));
            call.Fds.Clear();
            return new JsonObject { ["fd"] = fd.Number, ["fdset-id"] = id };
        }
    }

    private long FirstFree()
    {
        long id = 0;
        while (_sets.ContainsKey(id)) id++;
        return id;
    }

    private JsonNode? RemoveFd(QmpCall call)
    {
        long id = call.Int("fdset-id");
        long? number = call.TryInt("fd");
        lock (_gate)
        {
            List<(OwnedFd Fd, string? Opaque)> set = _sets.GetValueOrDefault(id) ?? [];
            (OwnedFd Fd, string? Opaque)[] removed = [.. set.Where(f => number is null || f.Fd.Number == number)];
            if (removed.Length == 0)
            {
                string which = number is null ? $"fdset-id:{id}" : string.Create(CultureInfo.InvariantCulture, $"fdset-id:{id}, fd:{number}");
                throw new QmpErrorException($"File descriptor named '{which}' not found");
            }
            foreach ((OwnedFd Fd, string? Opaque) one in removed)
            {
                set.Remove(one);
                one.Fd.Dispose();
            }
            if (set.Count == 0) _sets.Remove(id);
        }
        return null;
    }

    private JsonArray QueryFdSets(QmpCall call)
    {
        var result = new JsonArray();
        lock (_gate)
        {
            foreach ((long id, List<(OwnedFd Fd, string? Opaque)> set) in _sets)
            {
                var fds = new JsonArray();
                foreach ((OwnedFd fd, string? opaque) in set)
                {
                    var one = new JsonObject { ["fd"] = fd.Number };
                    if (opaque is not null) one["opaque"] = opaque;
                    fds.Add((JsonNode)one);
                }
                result.Add((JsonNode)new JsonObject { ["fdset-id"] = id, ["fds"] = fds });
            }
        }
        return result;
    }

    /// <summary>Undoes <see cref="Serving"/> when disposed.</summary>
    internal readonly struct Scope(QmpFds owner) : IDisposable
    {
        public void Dispose() => owner._serving.Value = null;
    }
}
