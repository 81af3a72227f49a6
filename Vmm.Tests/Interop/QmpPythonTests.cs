using NUnit.Framework;
using Vmm.Migration.Qmp;
using Vmm.Migration.Status;
using Vmm.Tests.Support;

namespace Vmm.Tests.Interop;

/// <summary>QEMU's unmodified Python clients against our QMP server. VMM_QEMU_PYTHON names the folder that holds their package <c>qemu</c>.</summary>
[TestFixture]
[Category(QemuVersions.Category)]
[Parallelizable(ParallelScope.All)]
[FixtureLifeCycle(LifeCycle.InstancePerTestCase)]
public sealed class QmpPythonTests : IDisposable
{
    private readonly TempDirectory _directory = new();
    private readonly TestVm _vm = TestVm.WithRam(1 << 20);
    private readonly QmpServer _server;

    public QmpPythonTests()
    {
        _server = new QmpServer(_vm.Vm, _vm.Engine);
        _server.Listen(_directory["qmp"]);
    }

    public void Dispose()
    {
        _server.Dispose();
        _vm.Dispose();
        _directory.Dispose();
    }

    [Test]
    public async Task The_asynchronous_client_drives_a_migration_and_follows_its_events()
    {
        string output = Python("""
            import asyncio, sys
            from qemu.qmp import QMPClient, EventListener, ExecuteError
            async def main():
                qmp = QMPClient('test')
                await qmp.connect(sys.argv[1])
                print((await qmp.execute('query-status'))['status'])
                try:
                    await qmp.execute('nope')
                except ExecuteError as e:
                    print(e.error_class, e)
                await qmp.execute('migrate-set-capabilities', {'capabilities': [{'capability': 'events', 'state': True}]})
                seen = []
                with qmp.listener('MIGRATION') as listener:
                    await qmp.execute('cont')
                    await qmp.execute('migrate', {'uri': 'exec:cat > ' + sys.argv[2]})
                    async for event in listener:
                        seen.append(event['data']['status'])
                        if seen[-1] in ('completed', 'failed'):
                            break
                print(*seen)
                info = await qmp.execute('query-migrate')
                print(info['status'], info['ram']['total'])
                await qmp.execute('quit')
                await qmp.disconnect()
            asyncio.run(main())
            """, _directory["qmp"], _directory["stream"]);
        Assert.That(output.ReplaceLineEndings("|"), Is.EqualTo(
            "prelaunch|CommandNotFound The command nope has not been found|setup active device completed|completed 1048576|"));
        using (Assert.EnterMultipleScope())
        {
            Assert.That((await _server.QuitRequested.WaitAsync(TimeSpan.FromSeconds(20))).ExitCode, Is.Zero);
            Assert.That(new FileInfo(_directory["stream"]).Length, Is.GreaterThan(0));
            Assert.That(_vm.Engine.Status, Is.EqualTo(MigrationStatus.Completed));
        }
    }

    [Test]
    public void The_legacy_client_executes_and_pulls_events()
    {
        string output = Python("""
            import sys
            from qemu.qmp.legacy import QEMUMonitorProtocol
            with QEMUMonitorProtocol(sys.argv[1]) as qmp:
                print(qmp.connect()['QMP']['version']['qemu']['major'])
                print(qmp.command('query-name'))
                qmp.command('cont')
                print(qmp.pull_event(wait=10.0)['event'])
                print(qmp.cmd('stop'))
            """, _directory["qmp"]);
        Assert.That(output.ReplaceLineEndings("|"), Is.EqualTo("11|{}|RESUME|{'return': {}}|"));
    }

    [Test]
    public async Task Qmp_shell_runs_commands_of_every_kind()
    {
        string output = Shell("", "query-status", "migrate-set-parameters max-bandwidth=1048576",
            "migrate-set-capabilities capabilities=[{'capability':'events','state':true}]", "migrate uri=exec:cat>/dev/null", "query-uuid", "nope", "quit");
        await _server.QuitRequested.WaitAsync(TimeSpan.FromSeconds(30));
        using (Assert.EnterMultipleScope())
        {
            Assert.That(output, Does.Contain("{\"return\": {\"running\": false, \"status\": \"prelaunch\"}}"));
            Assert.That(output, Does.Contain("has not been found"));
            Assert.That(output, Does.Contain("\"UUID\""));
            Assert.That(_vm.Engine.Parameters.MaxBandwidthBytesPerSecond, Is.EqualTo(1 << 20));
        }
    }

    [Test]
    public void Qmp_shell_speaks_the_human_monitor()
    {
        string output = Shell("-H ", "info status", "migrate_set_parameter downtime-limit 20", "bogus");
        using (Assert.EnterMultipleScope())
        {
            Assert.That(output, Does.Contain("VM status: paused (prelaunch)"));
            Assert.That(output, Does.Contain("unknown command: 'bogus'"));
            Assert.That(_vm.Engine.Parameters.DowntimeLimitMs, Is.EqualTo(20));
        }
    }

    private string Shell(string options, params string[] lines)
    {
        File.WriteAllLines(_directory["input"], lines);
        return Run($"-m qemu.qmp.qmp_shell {options}{_directory["qmp"]} < {_directory["input"]}");
    }

    private string Python(string script, params string[] arguments)
    {
        File.WriteAllText(_directory["script.py"], script);
        return Run($"{_directory["script.py"]} {string.Join(' ', arguments)}");
    }

    private string Run(string arguments)
    {
        string python = QemuVersions.Folder("VMM_QEMU_PYTHON");
        (int status, string output, string errors) = Support.Shell.Run("/bin/sh", "-c",
            $"HOME={_directory.Path} PYTHONDONTWRITEBYTECODE=1 PYTHONPATH={python} exec python3 {arguments}");
        Assert.That(status, Is.Zero, output + errors);
        return output;
    }
}
