using Vmm.Core.Channels;
using Vmm.Core.Errors;
using Vmm.Core.SaveVm;
using Vmm.Migration.Attempts;
using Vmm.Migration.Channels;
using Vmm.Migration.Cpr;
using Vmm.Migration.Multifd;
using Vmm.Migration.Ram;

namespace Vmm.Migration.Outgoing;

/// <summary>What one outgoing migration is asked to do. Checked before the attempt begins; immutable.</summary>
internal sealed record OutgoingPlan
{
    private OutgoingPlan()
    {
    }

    /// <summary>The destination's address; null when the channel exists already.</summary>
    internal MigrationAddress? Address { get; private init; }

    /// <summary>The address where the new process takes descriptors; mode cpr-transfer only.</summary>
    internal MigrationAddress? CprAddress { get; private init; }

    /// <summary>Mode, capabilities, parameters and variant of the framing in force when the attempt began.</summary>
    internal required SaveContext Context { get; init; }

    /// <summary>True when the destination writes back on the channel; its answer then decides.</summary>
    internal bool HasReturnPath { get; private init; }

    internal MigrationMode Mode => Context.Mode;

    /// <summary>The settings of multifd; null while it is off.</summary>
    internal MultifdSettings? Multifd { get; private init; }

    internal bool HasSwitchoverAck => Context.Capabilities.IsOn(MigrationCapability.SwitchoverAck);

    /// <summary>
    /// True when RAM stays in place. Little is sent then, and the threads of the switchover run with realtime priority for these few milliseconds.
    /// </summary>
    internal bool IsUpdate => Mode is MigrationMode.CprTransfer or MigrationMode.CprExec;

    /// <summary>Longest wait for the answer of a destination without final word that has been asked not to confirm; shorter for one on this host.</summary>
    internal TimeSpan CancelAnswer => CprAddress is null ? TimeSpan.FromSeconds(5) : TimeSpan.FromMilliseconds(500);

    /// <summary>Makes the plan from the settings in force now.</summary>
    /// <exception cref="ConfigurationException">Two settings exclude each other.</exception>
    internal static OutgoingPlan Make(MigrationContext vm, MigrationAddress? address, IMigrationChannel? channel, MigrationAddress? cpr)
    {
        var context = new SaveContext
        {
            Mode = vm.Parameters.Current.Mode, Capabilities = vm.Capabilities.Current, Parameters = vm.Parameters.Current, Compat = vm.Compat,
        };
        bool able = channel?.IsBidirectional ?? address!.IsSocket;
        // With cpr-transfer both processes use the same memory, so each must know which of them has the VM. A destination answers even with the capability off.
        bool wanted = context.Capabilities.IsOn(MigrationCapability.ReturnPath) || (context.Mode == MigrationMode.CprTransfer && able);
        if (wanted && !able)
            throw new ConfigurationException($"capability 'return-path' needs a socket; {address?.ToString() ?? channel!.Name} goes one way") { Hint = "switch return-path off, or use tcp: or unix:" };
        var plan = new OutgoingPlan { Address = address, CprAddress = cpr, Context = context, HasReturnPath = wanted, Multifd = context.Capabilities.IsOn(MigrationCapability.Multifd) ? MultifdSettings.Of(context.Parameters) : null };
        if (context.Capabilities.IsOn(MigrationCapability.MappedRam))
        {
            if (!(channel is ISeekableChannel || address is { Transport: MigrationTransport.File })) throw new ConfigurationException(MappedRamSave.NotSeekable);
            if (plan.Multifd is not null)
                throw new ConfigurationException("multifd with mapped-ram is not implemented in this version of vmm") { Hint = "switch multifd off; the file is the same" };
        }
        if (plan.Multifd is not null && address is not { IsSocket: true })
            throw new ConfigurationException("Migration requires multi-channel URIs (e.g. tcp)") { Hint = "switch multifd off, or use tcp: or unix:" };
        if (plan.Multifd is not null && context.Compat.LegacyDescriptions && !context.Parameters.MultifdFlushAfterEachSection)
            throw new ConfigurationException("a peer before QEMU 9.0 synchronises multifd after each section") { Hint = "switch parameter x-multifd-flush-after-each-section on" };
        return plan;
    }
}
