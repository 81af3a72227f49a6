using Microsoft.Extensions.DependencyInjection;
using Vmm.Core.Cpr;
using Vmm.Core.Devices;
using Vmm.Core.Errors;
using Vmm.Core.SaveVm;
using Vmm.Migration.Channels;
using Vmm.Migration.Cpr;
using Vmm.Migration.Engine;
using Vmm.Migration.Status;

namespace Vmm.Migration.Update;

/// <summary>
/// Moves a small VM within this process by cpr-transfer before the real VM stops, so that the runtime has compiled the code of a move by then.
/// Otherwise it would compile that code while the guest is stopped. One per host; thread-safe; runs one rehearsal at a time.
/// </summary>
/// <param name="factory">Makes the VMs.</param>
/// <param name="options">The host's stand-in and directory.</param>
internal sealed class MoveRehearsal(VmFactory factory, MoveRehearsalOptions options)
{
    private static readonly TimeSpan s_limit = TimeSpan.FromSeconds(10), s_learning = TimeSpan.FromSeconds(1);

    private readonly Lock _gate = new();

    /// <summary>Rehearses a move of a VM on a dedicated thread. Takes at most a second, or ten if something hangs.</summary>
    /// <param name="real">The options of the VM that is to move.</param>
    /// <returns>Why the rehearsal failed, or null. The task never faults.</returns>
    public Task<string?> RunAsync(VmOptions real)
    {
        ArgumentNullException.ThrowIfNull(real);
        return Task.Factory.StartNew(() => Run(real), CancellationToken.None, TaskCreationOptions.LongRunning, TaskScheduler.Default);
    }

    private string? Run(VmOptions real)
    {
        string? problem;
        try
        {
            lock (_gate)
            {
                using var folder = UpdateFolder.Open(options.Directory);
                problem = Move(real, folder);
            }
        }
        catch (Exception e) when (e is VmmException or OperationCanceledException or IOException or UnauthorizedAccessException)
        {
            problem = e.Message;
        }
        if (problem is not null) options.Failed?.Invoke(problem);
        return problem;
    }

    private string? Move(VmOptions real, UpdateFolder folder)
    {
        MigrationAddress main = UpdateTicket.Unix(folder.Claim(".try.main")), cpr = UpdateTicket.Unix(folder.Claim(".try.cpr"));
        using MoveStandIn standIn = options.CreateStandIn(real, folder.Claim(".try.dev"));
        using var limit = new CancellationTokenSource(s_limit);
        using Vm from = Create(standIn, null);
        IMigrationEngine source = Engine(from);
        // Run the stand-in only until its guest has used the devices: a busy host needs the CPU time for other work.
        from.Cont();
        using (var learning = CancellationTokenSource.CreateLinkedTokenSource(limit.Token))
        {
            learning.CancelAfter(s_learning);
            standIn.WaitUntilUsed(from, learning.Token);
        }
        from.Stop();
        source.Parameters = new MigrationParameters { Mode = MigrationMode.CprTransfer };
        source.SetCapabilities([new(MigrationCapability.ReturnPath, true)]);
        var listening = new TaskCompletionSource(TaskCreationOptions.RunContinuationsAsynchronously);
        Task<CprTransferReceiver> receiving = Task.Run(() => CprTransferReceiver.Receive(cpr, limit.Token, listening.SetResult));
        Task.WaitAny(listening.Task, receiving);
        using CancellationTokenRegistration cancel = limit.Token.Register(source.Cancel);
        Task<MigrationStatus> outgoing = source.Migrate(main, cpr);
        using CprTransferReceiver receiver = receiving.GetAwaiter().GetResult();
        using Vm to = Create(standIn, receiver.Incoming);
        Task<MigrationStatus> incoming = Engine(to).MigrateIncoming(main);
        from.Cont();
        receiver.Dispose();
        MigrationStatus sent = outgoing.GetAwaiter().GetResult();
        return sent == MigrationStatus.Completed && incoming.Wait(s_limit) ? null : $"{source.Query().Error}";
    }

    private Vm Create(MoveStandIn standIn, CprIncoming? cpr)
    {
        Vm vm = factory.Create(standIn.Options with { IsIncoming = cpr is not null, Cpr = cpr });
        standIn.OnCreated(vm);
        return vm;
    }

    private static IMigrationEngine Engine(Vm vm) => vm.Services.GetRequiredService<IMigrationEngine>();
}
