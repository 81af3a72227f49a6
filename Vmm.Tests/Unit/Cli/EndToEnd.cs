using Vmm.Tests.Support;
using Vmm.Tools.Cli.Client;

namespace Vmm.Tests.Unit.Cli;

/// <summary>Runs the real program, each test with a VM directory and VMs of its own.</summary>
[Category("cli")]
[CancelAfter(120_000)]
internal abstract class EndToEnd
{
    protected const int SigInt = 2, SigKill = 9, SigTerm = 15;

    /// <summary>The program.</summary>
    protected VmmCommands Vmm { get; private set; } = null!;

    [SetUp]
    public void SetUp() => Vmm = new VmmCommands();

    [TearDown]
    public async Task TearDown() => await Vmm.DisposeAsync();

    /// <summary>Waits for a run state: a destination runs a moment after its source knows that it has the VM.</summary>
    protected async Task WaitForState(PeerProcess vm, string state)
    {
        using var limit = new CancellationTokenSource(VmmCommands.Deadline);
        while (await Vmm.State(vm) != state) limit.Token.ThrowIfCancellationRequested();
    }

    /// <summary>A VM whose RAM is full and changes.</summary>
    protected Task<PeerProcess> Busy(string name) => Vmm.StartVm(name, "--workload", "pattern,rate=10M,prefill=on");
}
