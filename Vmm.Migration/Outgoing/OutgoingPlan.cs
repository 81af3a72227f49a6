using Vmm.Core.Channels;
using Vmm.Core.Errors;
using Vmm.Core.SaveVm;
using Vmm.Migration.Attempts;
using Vmm.Migration.Channels;
using Vmm.Migration.Cpr;

namespace Vmm.Migration.Outgoing;

/// <summary>What one outgoing migration is asked to do; checked before anything is taken, and unchanged while it runs.</summary>
internal sealed record OutgoingPlan
{
    private OutgoingPlan()
    {
    }

    /// <summary>Where to; null when the channel exists already.</summary>
    internal MigrationAddress? Address { get; private init; }

    /// <summary>Where the new process takes descriptors; mode cpr-transfer only.</summary>
    internal MigrationAddress? CprAddress { get; private init; }

    /// <summary>Capabilities, parameters and form that were in force.</summary>
    internal required SaveContext Context { get; init; }

    /// <summary>The destination writes back on the channel, and its answer decides.</summary>
    internal bool HasReturnPath { get; private init; }

    internal MigrationMode Mode => Context.Mode;

    internal bool HasMultifd => Context.Capabilities.IsOn(MigrationCapability.Multifd);

    internal bool HasSwitchoverAck => Context.Capabilities.IsOn(MigrationCapability.SwitchoverAck);

    /// <summary>RAM stays where it is: little is sent, and for the few milliseconds that this takes its threads go before ordinary ones.</summary>
    internal bool IsUpdate => Mode is MigrationMode.CprTransfer or MigrationMode.CprExec;

    /// <summary>Takes down what is in force now.</summary>
    /// <exception cref="ConfigurationException">Parts that do not go together.</exception>
    internal static OutgoingPlan Make(MigrationContext vm, MigrationAddress? address, IMigrationChannel? channel, MigrationAddress? cpr)
    {
        var context = new SaveContext
        {
            Mode = vm.Parameters.Current.Mode, Capabilities = vm.Capabilities.Current, Parameters = vm.Parameters.Current, Compat = vm.Compat,
        };
        bool able = channel?.IsBidirectional ?? address!.IsSocket;
        // Nothing is copied, so both sides must know who has it; a destination answers whether or not it has the capability on.
        bool wanted = context.Capabilities.IsOn(MigrationCapability.ReturnPath) || (context.Mode == MigrationMode.CprTransfer && able);
        if (wanted && !able)
            throw new ConfigurationException($"capability 'return-path' needs a socket; {address?.ToString() ?? channel!.Name} goes one way") { Hint = "switch return-path off, or use tcp: or unix:" };
        var plan = new OutgoingPlan { Address = address, CprAddress = cpr, Context = context, HasReturnPath = wanted };
        if (plan.HasMultifd && address is not { IsSocket: true })
            throw new ConfigurationException("Migration requires multi-channel URIs (e.g. tcp)") { Hint = "switch multifd off, or use tcp: or unix:" };
        if (plan.HasMultifd && context.Compat.LegacyDescriptions)
            throw new ConfigurationException("multifd is not implemented for peers before QEMU 9.0, which synchronise it in another way");
        return plan;
    }
}
