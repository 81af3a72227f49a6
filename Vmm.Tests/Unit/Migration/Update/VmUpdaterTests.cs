using Microsoft.Extensions.DependencyInjection;
using Vmm.Core.Devices;
using Vmm.Core.Errors;
using Vmm.Core.Memory;
using Vmm.Core.RunStates;
using Vmm.Core.SaveVm;
using Vmm.Migration;
using Vmm.Migration.Update;
using Vmm.Tests.Support;

namespace Vmm.Tests.Unit.Migration.Update;

/// <summary>When an embedder's update fails, the VM goes on, nothing stays behind, and the error does not mention a command line.</summary>
[TestFixture]
internal sealed class VmUpdaterTests
{
    private readonly ServiceProvider _host = Host();
    private TempDirectory _folder = null!;
    private Vm _vm = null!;

    [SetUp]
    public void Start()
    {
        _folder = new TempDirectory();
        _vm = _host.GetRequiredService<VmFactory>().Create(new VmOptions { Memory = [new RamBlockOptions { Name = "ram", SizeBytes = 1 << 20 }] });
        _vm.Cont();
    }

    [TearDown]
    public void Stop()
    {
        _vm.Dispose();
        _folder.Dispose();
    }

    [OneTimeTearDown]
    public void End() => _host.Dispose();

    [Test]
    public void AProgramThatEndsAtOnceIsNamedByItsExitCode([Values] UpdateMethod method)
    {
        int abandoned = 0;
        UpdateOptions options = Shell("exit 3", method) with { Abandoned = pid => abandoned = pid };
        Assert.That(async () => await _vm.Updater().UpdateAsync(options), Throws.TypeOf<MigrationFailedException>().With.Message.Contains("exit code 3"));
        Assert.That(abandoned, method == UpdateMethod.Transfer ? Is.Positive : Is.Zero);
        ExpectAsBefore();
    }

    [Test]
    public void AProgramThatIsNeverReadyIsEndedAfterTheTimeout([Values] UpdateMethod method)
    {
        UpdateOptions options = Shell("exec sleep 100", method) with { Timeout = TimeSpan.FromMilliseconds(200) };
        Assert.That(async () => await _vm.Updater().UpdateAsync(options), Throws.TypeOf<MigrationFailedException>().With.Message.Contains("not ready within 200 ms"));
        ExpectAsBefore();
    }

    [Test]
    public async Task ACallerCanCancel([Values] UpdateMethod method)
    {
        using var cancel = new CancellationTokenSource();
        Task<UpdateResult> update = _vm.Updater().UpdateAsync(Shell("exec sleep 100", method), cancel.Token);
        Assert.That(async () => await _vm.Updater().UpdateAsync(Shell("exit 0", method)), Throws.TypeOf<MigrationFailedException>().With.Message.Contains("an update of this VM is under way"));
        await cancel.CancelAsync();
        Assert.That(async () => await update, Throws.InstanceOf<OperationCanceledException>());
        ExpectAsBefore();
    }

    [Test]
    public void ABlockedVmStartsNoProcess([Values] UpdateMethod method)
    {
        using IDisposable blocker = _vm.Services.GetRequiredService<MigrationBlockers>().Add("it must stay");
        Assert.That(async () => await _vm.Updater().UpdateAsync(Shell($"echo > {_folder["begun"]}", method)), Throws.TypeOf<MigrationBlockedException>().With.Message.Contains("it must stay"));
        ExpectAsBefore();
    }

    [Test]
    public void ADirectoryThatOthersMayWriteInIsRefused()
    {
        File.SetUnixFileMode(_folder.Path, (UnixFileMode)0x1FF);
        Assert.That(async () => await _vm.Updater().UpdateAsync(Shell("exit 0", UpdateMethod.Transfer)), Throws.TypeOf<ConfigurationException>().With.Message.Contains("not safe to use"));
        ExpectAsBefore();
    }

    /// <summary>Options of an update whose new program is a shell script.</summary>
    private UpdateOptions Shell(string script, UpdateMethod method) => new()
    {
        Binary = "/bin/sh", Arguments = ["-c", script], TrialArguments = [], Method = method, Directory = _folder.Path, Rehearse = false,
    };

    private void ExpectAsBefore()
    {
        Assert.That(_vm.RunState.State, Is.EqualTo(RunState.Running));
        Assert.That(_vm.Migration().Parameters.Mode, Is.EqualTo(MigrationMode.Normal));
        Assert.That(_vm.Migration().Capabilities.IsOn(MigrationCapability.ReturnPath), Is.False);
        Assert.That(Directory.EnumerateFileSystemEntries(_folder.Path), Is.Empty);
    }

    private static ServiceProvider Host()
    {
        var services = new ServiceCollection();
        services.AddVmm().AddMigration();
        return services.BuildServiceProvider();
    }
}
