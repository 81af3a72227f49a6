using System.Buffers.Binary;
using Vmm.Core.Channels;
using Vmm.Core.SaveVm;
using Vmm.Core.Wire;
using Vmm.Migration.Attempts;
using Vmm.Migration.Channels;
using Vmm.Migration.Multifd;
using Vmm.Migration.Ram;
using Vmm.Migration.Stream;

namespace Vmm.Migration.Incoming;

/// <summary>
/// The stream of one incoming migration, from header to VMDESC, with its commands and return path (QEMU: <c>qemu_loadvm_state</c>). One thread.
/// </summary>
internal sealed class IncomingStream
{
    private readonly MigrationContext _vm;
    private readonly QemuFileReader _f;
    private readonly CommandReader _commands;
    private readonly LoadStream _stream;
    private readonly MultifdReceiver? _receiver;
    private int _acksMissing;
    private bool _isSetUp;

    /// <param name="vm">The parts of the VM.</param>
    /// <param name="channel">Brings the stream.</param>
    /// <param name="receiver">Reads the channels of multifd; null without.</param>
    /// <param name="onSwitchover">Called before each END and FULL section, which only a stopped source sends.</param>
    /// <param name="cancel">Ends the load.</param>
    internal IncomingStream(MigrationContext vm, IMigrationChannel channel, MultifdReceiver? receiver, Action onSwitchover, CancellationToken cancel)
    {
        (_vm, _receiver) = (vm, receiver);
        _f = new QemuFileReader(channel);
        _commands = new CommandReader(_f, channel.IsBidirectional ? () => new ReturnPathWriter(channel) : null) { Opened = ApproveWithoutDevices };
        MigrationCapabilities capabilities = vm.Capabilities.Current;
        var context = new LoadContext
        {
            // When memory came by descriptor, the stream has no pages.
            Mode = vm.Vm.CprFds.IsIncoming ? MigrationMode.CprTransfer : MigrationMode.Normal,
            Capabilities = capabilities, Compat = vm.Compat, HasDataChannels = receiver is { CarriesState: true }, SyncDataChannels = receiver is null ? null : receiver.WaitSync,
            ApproveSwitchover = capabilities.IsOn(MigrationCapability.SwitchoverAck) ? Approved : null, Cancel = cancel,
        };
        _stream = new LoadStream(vm.Vm.SaveVm, _f, context) { ReadCommand = _commands.Read, OnSwitchover = onSwitchover };
        _commands.Sections = _stream;
    }

    /// <summary>The open return path, or null.</summary>
    internal ReturnPathWriter? ReturnPath => _commands.ReturnPath;

    /// <summary>The source's run state; null without that section.</summary>
    internal GlobalState? GlobalState { get; private set; }

    /// <summary>Reads header and configuration.</summary>
    internal void ReadHeader()
    {
        if (_f.Peek(4) is { Length: 4 } first && BinaryPrimitives.ReadUInt32BigEndian(first) == MultifdPacket.Magic) throw ChannelCount.Refusal(1, expected: 0);
        StreamHeader.Read(_f, _vm.Identity, _stream.Context);
    }

    /// <summary>Reads the commands before the first section, which open the return path.</summary>
    internal void ReadLeadingCommands() => _commands.ReadLeading();

    /// <summary>Reads everything from the first section to VMDESC, and waits for what comes over channels of multifd.</summary>
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

    /// <summary>Checks before the confirmation that all pages and the whole state of every device have come.</summary>
    /// <exception cref="Core.Errors.VmmException">Names what never came.</exception>
    internal void ThrowIfIncomplete()
    {
        _receiver?.ThrowIfIncomplete(_stream.Find<RamLoad>() is { UsesFlush: true });
        _stream.ThrowIfIncomplete();
    }

    /// <summary>True when the source has offered a final word, for which the confirmation must wait.</summary>
    internal bool SourceHasFinalWord => _commands.SourceHasFinalWord;

    /// <summary>Reads the source's final word; blocks.</summary>
    internal MigCommand ReadFinalWord() => _commands.ReadFinalWord();

    /// <summary>True when a byte behind the stream has come already.</summary>
    internal bool HasUnread => _f.HasBuffered || _f.Channel is SocketChannel { } socket && socket.HasUnread();

    /// <summary>Ends the attempt of every section, successful or not. Takes the BQL.</summary>
    internal void Cleanup() => _stream.LoadCleanup();

    private void ApproveWithoutDevices()
    {
        if (_stream.Context is { ApproveSwitchover: not null, Compat.LegacySwitchoverAck: true } && _isSetUp && _acksMissing == 0) ReturnPath?.SendSwitchoverAck();
    }

    /// <summary>A device has loaded its first data. Each device is acknowledged; with older peers only the last one is (vfio-migration 3.6).</summary>
    private void Approved()
    {
        if (_stream.Context.Compat.LegacySwitchoverAck && --_acksMissing != 0) return;
        ReturnPath?.SendSwitchoverAck();
    }
}
