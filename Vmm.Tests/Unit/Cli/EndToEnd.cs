using Vmm.Tests.Support;
using Vmm.Tools.Cli.Client;

namespace Vmm.Tests.Unit.Cli;

/// <summary>Runs the real program; each test has its own VM directory and VMs.</summary>
[Category("cli")]
[CancelAfter(120_000)]
internal abstract class EndToEnd
{
    protected const int SigInt = 2, SigKill = 9, SigTerm = 15;

    /// <summary>The program under test.</summary>
    protected VmmCommands Vmm { get; private set; } = null!;

    [SetUp]
    public void SetUp() => Vmm = new VmmCommands();

    [TearDown]
    public async Task TearDown() => await Vmm.DisposeAsync();

    /// <summary>Waits for a run state, because a destination starts to run shortly after its source reports completion.</summary>
    protected async Task WaitForState(PeerProcess vm, string state)
    {
        using var limit = new CancellationTokenSource(VmmCommands.Deadline);
        while (await Vmm.State(vm) != state) limit.Token.ThrowIfCancellationRequested();
    }

    /// <summary>Starts a VM whose RAM is filled and keeps changing.</summary>
    protected Task<PeerProcess> Busy(string name) => Vmm.StartVm(name, "--workload", "pattern,rate=10M,prefill=on");
}
