using System.Buffers.Binary;
using Vmm.Core.Channels;
using Vmm.Core.SaveVm;
using Vmm.Core.Wire;
using Vmm.Migration.Attempts;
using Vmm.Migration.Multifd;
using Vmm.Migration.Ram;
using Vmm.Migration.Stream;

namespace Vmm.Migration.Incoming;

/// <summary>The stream of one incoming migration, from header to VMDESC, with its commands and return path (QEMU: <c>qemu_loadvm_state</c>). One thread.</summary>
internal sealed class IncomingStream
{
    private readonly MigrationContext _vm;
    private readonly QemuFileReader _f;
    private readonly CommandReader _commands;
    private readonly LoadStream _stream;
    private readonly MultifdReceiver? _receiver;
    private int _acksMissing;
    private bool _isSetUp;

    /// <param name="vm">The VM.</param>
    /// <param name="channel">Where the stream comes from.</param>
    /// <param name="receiver">Channels of multifd, or null.</param>
    /// <param name="onSwitchover">Called before each section that only a stopped source sends.</param>
    /// <param name="cancel">Ends the load.</param>
    internal IncomingStream(MigrationContext vm, IMigrationChannel channel, MultifdReceiver? receiver, Action onSwitchover, CancellationToken cancel)
    {
        (_vm, _receiver) = (vm, receiver);
        _f = new QemuFileReader(channel);
        _commands = new CommandReader(_f, channel.IsBidirectional ? () => new ReturnPathWriter(channel) : null) { Opened = ApproveWithoutDevices };
        MigrationCapabilities capabilities = vm.Capabilities.Current;
        var context = new LoadContext
        {
            // Memory that came by descriptor has no pages in the stream.
            Mode = vm.Vm.CprFds.IsIncoming ? MigrationMode.CprTransfer : MigrationMode.Normal,
            Capabilities = capabilities, Compat = vm.Compat, HasDataChannels = receiver is not null, SyncDataChannels = receiver is null ? null : receiver.WaitSync,
            ApproveSwitchover = capabilities.IsOn(MigrationCapability.SwitchoverAck) ? Approved : null, Cancel = cancel,
        };
        _stream = new LoadStream(vm.Vm.SaveVm, _f, context) { ReadCommand = _commands.Read, OnSwitchover = onSwitchover };
        _commands.Sections = _stream;
    }

    /// <summary>The open return path, or null.</summary>
    internal ReturnPathWriter? ReturnPath => _commands.ReturnPath;

    /// <summary>What came of the source's run state; null when the section takes no part.</summary>
    internal GlobalState? GlobalState { get; private set; }

    /// <summary>Header and configuration.</summary>
    internal void ReadHeader()
    {
        if (_f.Peek(4) is { Length: 4 } first && BinaryPrimitives.ReadUInt32BigEndian(first) == MultifdPacket.Magic) throw ChannelCount.Refusal(1, expected: 0);
        StreamHeader.Read(_f, _vm.Identity, _stream.Context);
    }

    /// <summary>The commands before the first section, which open the return path.</summary>
    internal void ReadLeadingCommands() => _commands.ReadLeading();

    /// <summary>Everything from the first section to VMDESC; on return everything has been read.</summary>
    internal void ReadBody()
    {
        _stream.LoadSetup();
        GlobalState = _stream.Find<GlobalState>();
        _acksMissing = _stream.SwitchoverAcksNeeded;
        _isSetUp = true;
        ApproveWithoutDevices();
        _receiver?.Start(_stream);
        _stream.ReadSections();
        _receiver?.WaitDevices();
        StreamEnd.Skip(_f, _stream.Context);
    }

    /// <summary>Nothing may run on half a state: all pages and all of every device have come. Call before the confirmation.</summary>
    /// <exception cref="Core.Errors.VmmException">Something never came; names it.</exception>
    internal void ThrowIfIncomplete()
    {
        _receiver?.ThrowIfIncomplete(_stream.Find<RamLoad>() is { UsesFlush: true });
        _stream.ThrowIfIncomplete();
    }

    /// <summary>Ends every section's part, well or not. Takes the BQL.</summary>
    internal void Cleanup() => _stream.LoadCleanup();

    private void ApproveWithoutDevices()
    {
        if (_stream.Context is { ApproveSwitchover: not null, Compat.LegacySwitchoverAck: true } && _isSetUp && _acksMissing == 0) ReturnPath?.SendSwitchoverAck();
    }

    /// <summary>A device has loaded its first data: each is acknowledged, or with older peers the last one only (vfio-migration 3.6).</summary>
    private void Approved()
    {
        if (_stream.Context.Compat.LegacySwitchoverAck && --_acksMissing != 0) return;
        ReturnPath?.SendSwitchoverAck();
    }
}
