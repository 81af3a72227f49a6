using Microsoft.Extensions.Logging;
using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Core.RunStates;
using Vmm.Core.VmStates;

namespace Vmm.Core.Devices;

/// <summary>
/// A serial port: <c>--device serial[,id=ID][,output=PATH][,input=PATH][,socket=PATH]</c>. Its section equals that of QEMU's <c>isa-serial</c> byte for
/// byte, VMDESC included. <c>output</c> is a file that gets what the guest sends. <c>input</c> is a terminal or pipe that the guest receives from; a
/// terminal is in raw mode while the guest runs. <c>socket</c> serves one client in both directions. Without options, the guest's bytes are dropped. The
/// first four ports of a VM are COM1 to COM4.
/// </summary>
internal sealed class SerialDevice : IVmDevice, IVmStateHandler, IIoHandler
{
    private static readonly (ushort Port, int Irq)[] s_places = [(0x3f8, 4), (0x2f8, 3), (0x3e8, 4), (0x2e8, 3)];

    /// <summary>QEMU's <c>vmstate_isa_serial</c>.</summary>
    public static VmStateDescription<SerialDevice> Description { get; } = new()
    {
        Name = "serial",
        VersionId = 3,
        MinimumVersionId = 2,
        Fields = [VmState.Struct<SerialDevice, Serial16550>("state", Serial16550.Description, static d => d.Port)],
    };

    private readonly SerialFileLine? _line;
    private readonly SerialSocketLine? _socket;
    private readonly OwnedFd? _inputFd;
    private readonly SerialInput? _input;
    private readonly TerminalMode? _terminal;
    private readonly List<IDisposable> _registrations = [];

    /// <summary>Makes the port and registers its section and its run-state handler. BQL: held.</summary>
    /// <param name="options">Reads the options <c>id</c>, <c>output</c>, <c>input</c> and <c>socket</c>.</param>
    /// <param name="services">Services of the device's VM.</param>
    /// <param name="line">The other end of the line; null for the one that the options name.</param>
    /// <param name="irq">Called with each change of the interrupt line; null to use the ISA line of the port.</param>
    /// <exception cref="ConfigurationException">A file cannot be opened, or options exclude each other.</exception>
    public SerialDevice(DeviceOptions options, IDeviceServices services, ISerialLine? line = null, Action<bool>? irq = null)
    {
        ArgumentNullException.ThrowIfNull(options);
        ArgumentNullException.ThrowIfNull(services);
        Id = options.Id;
        string output = options.GetString("output", "");
        string input = options.GetString("input", ""), socket = options.GetString("socket", "");
        if (socket.Length > 0 && (output.Length > 0 || input.Length > 0)) throw new ConfigurationException($"device '{Id}': option 'socket' excludes 'output' and 'input'");
        if (input.Length > 0) _inputFd = OpenInput(input, services);
        if (line is null && socket.Length > 0) line = _socket = new SerialSocketLine(Id, socket, services);
        if (line is null && output.Length > 0) line = _line = new SerialFileLine(Id, output, services.Loggers.CreateLogger<SerialDevice>());
        (ushort Port, int Irq)? place = s_places.Cast<(ushort Port, int Irq)?>().FirstOrDefault(p => services.Io.IsFree(p!.Value.Port, 8));
        if (irq is null && place is { } at) irq = level => services.Irqs.Set(at.Irq, level);
        if (_inputFd is not null) line = new InputLine(line, () => _input?.Follow());
        Port = new Serial16550(services.Clock, line, irq);
        _socket?.Attach(Port);
        if (_inputFd is not null) (_input, _terminal) = (new SerialInput(services, Port, _inputFd), TerminalMode.Of(_inputFd));
        try
        {
            if (place is { } p) _registrations.Add(services.Io.AddPorts(p.Port, 8, Id, this));
            _registrations.Add(services.RegisterVmState(Description, this));
            _registrations.Add(services.RunState.Register(this));
        }
        catch
        {
            Dispose();
            throw;
        }
    }

    /// <inheritdoc/>
    public string Id { get; }

    /// <summary>The registers of the port.</summary>
    public Serial16550 Port { get; }

    /// <inheritdoc/>
    public void OnVmStateChange(bool running, RunState state)
    {
        if (running)
        {
            _line?.SeekToEnd();
            Port.RetryTransmit();
        }
        else _line?.Flush();
        _socket?.SetRunning(running);
        _input?.SetRunning(running);
        // Raw only while the guest runs, so that a VM that has moved to another host or process leaves the terminal in the user's mode.
        _terminal?.SetRaw(running);
    }

    /// <inheritdoc/>
    public void Reset() => Port.Reset();

    /// <inheritdoc/>
    public ulong Read(ulong offset, int size)
    {
        ulong value = 0;
        for (int i = 0; i < size; i++) value |= (ulong)Port.ReadRegister((int)offset + i) << 8 * i;
        return value;
    }

    /// <inheritdoc/>
    public void Write(ulong offset, int size, ulong value)
    {
        for (int i = 0; i < size; i++) Port.WriteRegister((int)offset + i, (byte)(value >> 8 * i));
    }

    /// <inheritdoc/>
    public void Dispose()
    {
        for (int i = _registrations.Count - 1; i >= 0; i--) _registrations[i].Dispose();
        _registrations.Clear();
        _input?.Dispose();
        _terminal?.Dispose();
        _inputFd?.Dispose();
        Port.Dispose();
        _socket?.Dispose();
        _line?.Dispose();
    }

    private OwnedFd OpenInput(string path, IDeviceServices services)
    {
        OwnedFd fd = Posix.Open(path, Posix.O_NOCTTY, 0, out Errno errno)
            ?? throw new ConfigurationException($"device '{Id}': option 'input': cannot open '{path}': {Posix.Describe(errno)}");
        try
        {
            services.EventFds.Add(fd, static () => { }).Dispose();
            return fd;
        }
        catch (ChannelException e)
        {
            fd.Dispose();
            throw new ConfigurationException($"device '{Id}': option 'input': '{path}' cannot be polled; expected a terminal or a pipe", e);
        }
    }

    /// <summary>A line whose input comes from <see cref="SerialInput"/> and not from the line itself.</summary>
    private sealed class InputLine(ISerialLine? output, Action onRoom) : ISerialLine
    {
        public bool TryWrite(byte value) => output?.TryWrite(value) ?? true;

        public void OnReceiveRoom() => onRoom();
    }
}

/// <summary>Makes <see cref="SerialDevice"/>s.</summary>
internal sealed class SerialDeviceFactory : IDeviceFactory
{
    /// <inheritdoc/>
    public string TypeName => "serial";

    /// <inheritdoc/>
    public string Summary => "16550A serial port; output=PATH appends what it sends to a file, input=PATH reads a terminal or pipe (/dev/stdin), socket=PATH is both for one client";

    /// <inheritdoc/>
    public IReadOnlyList<IVmStateDescription> Descriptions => [SerialDevice.Description];

    /// <inheritdoc/>
    public IVmDevice Create(DeviceOptions options, IDeviceServices services) => new SerialDevice(options, services);
}

/// <summary>Adds the device type <c>serial</c>.</summary>
public sealed class SerialPlugin : IVmmPlugin
{
    /// <inheritdoc/>
    public void Configure(VmmBuilder builder)
    {
        ArgumentNullException.ThrowIfNull(builder);
        builder.AddDevice<SerialDeviceFactory>();
    }
}
