using System.Diagnostics;
using Vmm.Core.Interop;

namespace Vmm.Tests.Faults;

/// <summary>A VM of a run with all that belongs to it: its process, and for a VM with devices their server and the proxies before their sockets.</summary>
internal sealed class VmParts : IAsyncDisposable
{
    private static readonly TimeSpan s_serve = TimeSpan.FromSeconds(30);
    private readonly FaultProxy[] _proxies;
    private readonly FaultSession[] _sessions;
    private readonly Process? _server;

    private VmParts(FaultVm vm, FaultProxy[] proxies, FaultSession[] sessions, Process? server, string folder)
    {
        (Vm, _proxies, _sessions, _server, Folder) = (vm, proxies, sessions, server, folder);
    }

    internal FaultVm Vm { get; set; }

    internal string Folder { get; }

    /// <summary>True once a fault has hit its devices; it can be no side of another attempt then.</summary>
    internal bool HasLostDevice { get; set; }

    /// <summary>Files that an attempt has reported as left behind, so that the next one does not.</summary>
    internal HashSet<string> Reported { get; } = [];

    /// <summary>True for a VM that has devices.</summary>
    internal bool HasDevices => _server is not null;

    /// <summary>Starts a VM.</summary>
    /// <param name="folder">Holds its files.</param>
    /// <param name="name">A name that no other VM of the folder has.</param>
    /// <param name="kind">Decides whether it has devices.</param>
    /// <param name="incoming">The value of --incoming; null for a VM that starts a guest.</param>
    /// <param name="snapshotsOf">The VM whose snapshots it has; its own by default.</param>
    internal static async Task<VmParts> Start(string folder, string name, AttemptKind kind, string? incoming, string? snapshotsOf = null)
    {
        string[] arguments =
        [
            .. Guest.Arguments(kind, incoming is not null), "--snapshot-dir", Path.Combine(folder, $"snapshots-{snapshotsOf ?? name}"),
            .. incoming is null ? (string[])[] : ["--incoming", incoming],
        ];
        if (kind != AttemptKind.Device)
        {
            var alone = new VmParts(await FaultVm.Start(folder, name, arguments, kind == AttemptKind.Snapshot), [], [], null, folder);
            await Deadlines.Set(alone.Vm);
            return alone;
        }
        string[] sockets = [Path.Combine(folder, $"{name}-edu"), Path.Combine(folder, $"{name}-dma")];
        Process server = await Serve(folder, sockets);
        FaultSession[] sessions = [new FaultSession(Fault.None), new FaultSession(Fault.None)];
        FaultProxy[] proxies = [.. sockets.Select((s, i) => new FaultProxy($"unix:{s}", $"{s}.x", () => sessions[i], Role.SourceDevice))];
        try
        {
            FaultVm vm = await FaultVm.Start(folder, name,
            [
                .. arguments, "--device", $"vfio-user-pci,id=dev0,socket={sockets[0]}.x,enable-migration=on", "--device", $"vfio-user-pci,id=dev1,socket={sockets[1]}.x,enable-migration=on",
                "--device", "edu-guest",
            ]);
            await Deadlines.Set(vm);
            return new VmParts(vm, proxies, sessions, server, folder);
        }
        catch
        {
            foreach (FaultProxy one in proxies) one.Dispose();
            await End(server);
            throw;
        }
    }

    /// <summary>Lets the connections of one device count for an attempt, in the role of its side.</summary>
    internal void Arm(FaultSession session, Role role, int device)
    {
        if (_proxies.Length == 0) return;
        _sessions[device % 2] = session;
        _proxies[device % 2].Arm(session, role);
    }

    internal void Disarm()
    {
        for (int i = 0; i < _proxies.Length; i++) _proxies[i].Arm(_sessions[i] = new FaultSession(Fault.None), Role.SourceDevice);
    }

    internal void KillServer() => _server?.Kill();

    public async ValueTask DisposeAsync()
    {
        await Vm.DisposeAsync();
        foreach (FaultProxy one in _proxies) one.Dispose();
        if (_server is not null) await End(_server);
    }

    private static async Task<Process> Serve(string folder, string[] sockets)
    {
        ProcessStartInfo info = FaultVm.Command(folder, ["device", "serve", "--type", "edu,p2p=on", "--socket", sockets[0], "--type", "dma-test,seed=1,state-size=256K,p2p=on", "--socket", sockets[1]]);
        var process = new Process { StartInfo = info };
        var served = new TaskCompletionSource(TaskCreationOptions.RunContinuationsAsynchronously);
        process.OutputDataReceived += static (_, _) => { };
        process.ErrorDataReceived += (_, e) =>
        {
            if (e.Data?.Contains("serving dma-test", StringComparison.Ordinal) == true) served.TrySetResult();
        };
        process.Start();
        process.BeginErrorReadLine();
        process.BeginOutputReadLine();
        await served.Task.WaitAsync(s_serve);
        return process;
    }

    private static async Task End(Process server)
    {
        if (!server.HasExited) Posix.Kill(server.Id, 9);
        await server.WaitForExitAsync();
        server.Dispose();
    }
}
