using System.Globalization;
using System.Text.Json.Nodes;
using Vmm.Migration.Qmp;
using Vmm.Migration.Status;
using Vmm.Tools.Cli.Client;
using Vmm.Tools.Cli.Demo;
using Vmm.Tools.Devices;
using static Vmm.Tools.Devices.DmaTestRegisters;

namespace Vmm.Tests.Support;

/// <summary>
/// A <c>vmm run</c> process with <c>dma-test</c> devices, each served by its own <c>vmm device serve</c> process. Through the monitor this class acts
/// as the guest's CPU: it finds the devices in config space, programs their I/O BARs, starts their DMA and checks what they wrote.
/// </summary>
internal sealed class VfioUserVm
{
    internal const ulong RamBytes = 64UL << 20, Slots = 256, BlockBytes = 4096;

    private readonly VmmCommands _vmm;
    private readonly string _name;

    private VfioUserVm(VmmCommands vmm, string name, PeerProcess process, VmmCommands.Running[] servers)
    {
        (_vmm, _name, Process, Servers) = (vmm, name, process, servers);
    }

    internal PeerProcess Process { get; }

    internal VmmCommands.Running[] Servers { get; }

    /// <summary>Serves the devices and starts a VM with them.</summary>
    /// <param name="vmm">Runs the programs.</param>
    /// <param name="name">Name of the VM.</param>
    /// <param name="devices">The <c>dma-test</c> options of each device.</param>
    /// <param name="arguments">More arguments of <c>vmm run</c>.</param>
    internal static Task<VfioUserVm> Start(VmmCommands vmm, string name, string[] devices, params string[] arguments) => StartWith(vmm, name, devices, "", arguments);

    /// <summary>As <see cref="Start"/>, with more options for each <c>--device</c>.</summary>
    internal static async Task<VfioUserVm> StartWith(VmmCommands vmm, string name, string[] devices, string more, params string[] arguments)
    {
        var servers = new VmmCommands.Running[devices.Length];
        var options = new List<string>();
        for (int i = 0; i < devices.Length; i++)
        {
            string socket = vmm[$"{name}-{i}.sock"];
            servers[i] = vmm.Start("device", "serve", "--type", $"dma-test{devices[i]}", "--socket", socket);
            await servers[i].Line("serving dma-test");
            options.AddRange(["--device", $"vfio-user-pci,id=dev{i},socket={socket},migration-events=on,enable-migration=on{more}"]);
        }
        return new VfioUserVm(vmm, name, await vmm.StartVm(name, [.. options, .. arguments]), servers);
    }

    /// <summary>Starts a VM with devices of any type, all served by one process.</summary>
    /// <param name="vmm">Runs the programs.</param>
    /// <param name="name">Name of the VM.</param>
    /// <param name="types">The type of each device, with its options.</param>
    /// <param name="arguments">More arguments of <c>vmm run</c>.</param>
    internal static async Task<VfioUserVm> StartTogether(VmmCommands vmm, string name, string[] types, params string[] arguments)
    {
        VmmCommands.Running server = await ServeTogether(vmm, name, types);
        return await Attach(vmm, name, server, name, types.Length, arguments);
    }

    /// <summary>Starts a VM with the devices of a running server, whose sockets begin with <paramref name="sockets"/>.</summary>
    internal static async Task<VfioUserVm> Attach(VmmCommands vmm, string name, VmmCommands.Running server, string sockets, int devices, params string[] arguments)
    {
        IEnumerable<string> options = Enumerable.Range(0, devices).SelectMany(
            i => (string[])["--device", $"vfio-user-pci,id=dev{i},socket={vmm[$"{sockets}-{i}.sock"]},migration-events=on,enable-migration=on"]);
        return new VfioUserVm(vmm, name, await vmm.StartVm(name, [.. options, .. arguments]), [server]);
    }

    /// <summary>Starts the server of <see cref="StartTogether"/>, or a new one in place of a server that died.</summary>
    internal static async Task<VmmCommands.Running> ServeTogether(VmmCommands vmm, string name, string[] types)
    {
        VmmCommands.Running server = vmm.Start(["device", "serve", .. types.SelectMany((t, i) => (string[])["--type", t, "--socket", vmm[$"{name}-{i}.sock"]])]);
        await server.Line($"serving {types[^1].Split(',')[0]}");
        return server;
    }

    /// <summary>Programs the devices' I/O BARs and enables bus master, as firmware and driver do.</summary>
    internal async Task SetUp()
    {
        for (int i = 0; i < Servers.Length; i++) await SetUp(i);
    }

    /// <summary>As <see cref="SetUp()"/>, for one device.</summary>
    internal async Task SetUp(int device)
    {
        Assert.That(await ConfigRead(device, 0), Is.EqualTo(((uint)DeviceId << 16) | VendorId), $"device {device}");
        await ConfigWrite(device, 0x1c, Ports(device) | 1);
        await ConfigWrite(device, 0x04, 7);
        Assert.That(await Read32(device, Id), Is.EqualTo(IdValue));
    }

    /// <summary>Makes a device write numbered blocks into its part of memory.</summary>
    internal async Task StartDma(int device, uint bytesPerSecond = 20 << 20)
    {
        await Write32(device, Base, (uint)Address(device));
        await Write32(device, Length, (uint)(Slots * BlockBytes));
        await Write32(device, Rate, bytesPerSecond);
        await Write32(device, Control, ControlRun);
        await WaitForBlocks(device, 10);
    }

    /// <summary>Stops a device's DMA and compares every block in memory with the expected one.</summary>
    internal async Task<ulong> AssertMemory(int device)
    {
        await Write32(device, Control, 0);
        ulong next = await Read32(device, Sequence);
        Assert.That(await Read32(device, ErrorNumber), Is.Zero, $"{_name}: device {device} reports an error");
        string file = _vmm[$"{_name}-memory"];
        await Run("pmemsave", new JsonObject { ["val"] = Address(device), ["size"] = (long)(Slots * BlockBytes), ["filename"] = file });
        byte[] memory = await File.ReadAllBytesAsync(file);
        File.Delete(file);
        byte[] expected = new byte[BlockBytes];
        for (ulong slot = 0; slot < Slots; slot++)
        {
            long last = DmaTestPattern.LastOf(slot, Slots, next);
            if (last < 0) continue;
            DmaTestPattern.Fill((ulong)last, expected);
            Assert.That(memory.AsSpan((int)(slot * BlockBytes), (int)BlockBytes).SequenceEqual(expected), $"{_name}: device {device}, slot {slot}: block {last} of {next} is missing");
        }
        return next;
    }

    internal async Task WaitForBlocks(int device, uint more)
    {
        uint until = await Read32(device, Sequence) + more;
        using var limit = new CancellationTokenSource(VmmCommands.Deadline);
        while (await Read32(device, Sequence) < until) limit.Token.ThrowIfCancellationRequested();
    }

    internal async Task<uint> Read32(int device, ulong register)
    {
        await Out(Ports(device), (uint)register);
        return await In(Ports(device) + 4);
    }

    internal async Task<ulong> Read64(int device, ulong register) => await Read32(device, register) | ((ulong)await Read32(device, register + 4) << 32);

    internal async Task Write32(int device, ulong register, uint value)
    {
        await Out(Ports(device), (uint)register);
        await Out(Ports(device) + 4, value);
    }

    internal Task<JsonNode?> Run(string command, JsonObject? arguments = null) => Process.Monitor.Execute(command, arguments, CancellationToken.None);

    internal async Task<string> MigrationStatus() => (await Run("query-migrate"))!["status"]?.ToString() ?? "none";

    internal Task<string> State() => _vmm.State(Process);

    /// <summary>Waits until a migration has one of these states.</summary>
    internal async Task<string> WaitMigration(params string[] wanted)
    {
        using var limit = new CancellationTokenSource(VmmCommands.Deadline);
        while (true)
        {
            string status = await MigrationStatus();
            if (wanted.Contains(status)) return status;
            limit.Token.ThrowIfCancellationRequested();
        }
    }

    private static uint Ports(int device) => 0xc000u + ((uint)device * 8);

    private static ulong Address(int device) => 0x100_0000u + ((ulong)device * Slots * BlockBytes);

    internal async Task<uint> ConfigRead(int device, uint offset)
    {
        await Out(0xcf8, ConfigAddress(device, offset));
        return await In(0xcfc);
    }

    internal async Task ConfigWrite(int device, uint offset, uint value)
    {
        await Out(0xcf8, ConfigAddress(device, offset));
        await Out(0xcfc, value);
    }

    /// <summary>The address of a register for port 0xcf8. Device 0 is in slot 1, because <c>vmm run</c> assigns slots from 1.</summary>
    private static uint ConfigAddress(int device, uint offset) => 0x8000_0000u | ((uint)(device + 1) << 11) | offset;

    internal async Task Out(uint port, uint value) => Assert.That(await Hmp($"o/w 0x{port:x} 0x{value:x}"), Is.Empty);

    internal async Task<uint> In(uint port)
    {
        string answer = await Hmp($"i/w 0x{port:x}");
        return uint.Parse(answer.AsSpan(answer.LastIndexOf("0x", StringComparison.Ordinal) + 2).Trim(), NumberStyles.AllowHexSpecifier, CultureInfo.InvariantCulture);
    }

    private async Task<string> Hmp(string line) =>
        (await Run("human-monitor-command", new JsonObject { ["command-line"] = line }))!.GetValue<string>();
}
