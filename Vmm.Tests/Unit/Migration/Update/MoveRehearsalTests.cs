using Microsoft.Extensions.DependencyInjection;
using Vmm.Core.Devices;
using Vmm.Core.Memory;
using Vmm.Migration;
using Vmm.Migration.Update;
using Vmm.Tests.Support;

namespace Vmm.Tests.Unit.Migration.Update;

/// <summary>An embedder rehearses a move.</summary>
[TestFixture]
public class MoveRehearsalTests
{
    private static readonly VmOptions s_real = new() { Memory = [new RamBlockOptions { Name = "ram", SizeBytes = 1 << 20 }] };

    [Test]
    public async Task AHostThatAddsNothingCanRehearse()
    {
        await using ServiceProvider host = Host(new MoveRehearsalOptions());
        using Vm vm = host.GetRequiredService<VmFactory>().Create(s_real);
        Assert.That(await vm.RehearseMoveAsync(), Is.Null);
    }

    [Test]
    public async Task TwoAtOnceShareADirectoryAndLeaveNothingThere()
    {
        using var folder = new TempDirectory();
        await using ServiceProvider host = Host(new MoveRehearsalOptions { Directory = folder.Path });
        MoveRehearsal rehearsal = host.GetRequiredService<MoveRehearsal>();
        Assert.That(await Task.WhenAll(rehearsal.RunAsync(s_real), rehearsal.RunAsync(s_real)), Is.All.Null);
        Assert.That(Directory.EnumerateFileSystemEntries(folder.Path), Is.Empty);
    }

    [Test]
    public async Task AFailureIsToldAndNotThrownAndEndsTheStandIn()
    {
        string? told = null;
        Unknown? standIn = null;
        await using ServiceProvider host = Host(new MoveRehearsalOptions { CreateStandIn = (real, _) => standIn = new Unknown(real), Failed = why => told = why });
        string? problem = await host.GetRequiredService<MoveRehearsal>().RunAsync(s_real);
        Assert.That((problem, told), Is.EqualTo((told, problem)));
        Assert.That(problem, Does.Contain("'no-such-device'"));
        Assert.That(standIn!.IsDisposed);
    }

    private static ServiceProvider Host(MoveRehearsalOptions options)
    {
        var services = new ServiceCollection();
        services.AddSingleton(options);
        services.AddVmm().AddMigration();
        return services.BuildServiceProvider();
    }

    private sealed class Unknown(VmOptions real) : MoveStandIn(real)
    {
        internal bool IsDisposed { get; private set; }

        public override VmOptions Options => base.Options with { Devices = [new DeviceOptions("no-such-device")] };

        protected override void Dispose(bool disposing)
        {
            IsDisposed = true;
            base.Dispose(disposing);
        }
    }
}
