using Vmm.Core.Channels;
using Vmm.Core.SaveVm;
using Vmm.Core.Wire;
using Vmm.Migration.Attempts;
using Vmm.Migration.Multifd;
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

    internal void ReadHeader() => StreamHeader.Read(_f, _vm.Identity, _stream.Context);

    /// <summary>Everything from the first command to VMDESC; on return RAM and devices are complete.</summary>
    internal void ReadBody()
    {
        _commands.ReadLeading();
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

    /// <summary>Ends every section's part, well or not. Takes the BQL.</summary>
    internal void Cleanup() => _stream.LoadCleanup();

    private void ApproveWithoutDevices()
    {
        if (_stream.Context is { ApproveSwitchover: not null, Compat.LegacySwitchoverAck: true } && _isSetUp && _acksMissing == 0) ReturnPath?.SendSwitchoverAck();
    }

    /// <summary>A device has loaded its first data: each is acknowledged, or with older peers the last one only (spec vfio-migration 3.6).</summary>
    private void Approved()
    {
        if (_stream.Context.Compat.LegacySwitchoverAck && --_acksMissing != 0) return;
        ReturnPath?.SendSwitchoverAck();
    }
}
