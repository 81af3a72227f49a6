using System.Text;
using System.Text.Json.Nodes;
using Vmm.Core.Devices;
using Vmm.Core.SaveVm;
using Vmm.Core.Wire;
using Vmm.Migration.Stream.Viewer;
using Vmm.Tests.Support;

namespace Vmm.Tests.Interop;

/// <summary>
/// The devices that a KVM guest finds here are those of QEMU's microvm with a PCI bus: each section changes sides with a running QEMU, both ways,
/// body and VMDESC.
/// </summary>
[TestFixture, Category(QemuVersions.Category)]
public sealed class PcDeviceQemuTests
{
    private const string Rtc = "mc146818rtc", Keyboard = "pckbd", Host = "PCIHost", Bus = "PCIBUS", Bridge = "0000:00:00.0/gpex_root", Serial = "serial";
    private const int SizeMiB = 16;

    private static readonly string[] s_sections = [Host, Bus, Bridge, Rtc, Keyboard, Serial];
    private static readonly string[] s_machine = ["-M", "microvm,pcie=on,rtc=on,isa-serial=on", "-m", $"{SizeMiB}", "-device", "i8042", "-serial", "null", "-S"];

    private static string[] Versions => QemuVersions.All;

    [TestCaseSource(nameof(Versions))]
    public void WhatQemuSavesIsLoadedAndSavedTheSame(string version)
    {
        using QemuProcess qemu = QemuProcess.WithMachine(version, s_machine);
        byte[] stream = Saved(qemu);
        string descriptions = Encoding.ASCII.GetString(stream.AsSpan(stream.AsSpan().LastIndexOf("\"devices\": ["u8)));
        using var pc = new Pc();
        foreach (string name in s_sections)
        {
            SaveVmEntry entry = pc.Services.SaveVm.Find(name, 0)!;
            byte[] body = Body(stream, Entry(stream, name));
            SectionBytes.Load(entry.VmState!, body, entry.VersionId);
            Assert.That(Timeless(name, SectionBytes.Save(entry.VmState!)), Is.EqualTo(Timeless(name, body)), name);
            string description = SectionBytes.Describe(entry.VmState!)[1..^1];
            Assert.That(descriptions, Does.Contain($"{{\"name\": \"{name}\", \"instance_id\": 0, {description}}}"), name);
        }
    }

    [TestCaseSource(nameof(Versions))]
    public void WhatIsSavedHereQemuLoadsAndSavesTheSame(string version)
    {
        using QemuProcess source = QemuProcess.WithMachine(version, s_machine);
        byte[] stream = Saved(source);
        using var pc = new Pc();
        pc.Use();
        var ours = new Dictionary<string, byte[]>();
        foreach (StreamEntry entry in s_sections.Select(name => Entry(stream, name)).OrderByDescending(static e => e.Offset))
        {
            byte[] body = ours[entry.Name!] = SectionBytes.Save(pc.Services.SaveVm.Find(entry.Name!, 0)!.VmState!);
            byte[] theirs = Body(stream, entry);
            if (entry.Name != Bus) Assert.That(body, Is.Not.EqualTo(theirs), $"{entry.Name} is as it was at the start: nothing would be shown");
            int at = BodyOffset(entry);
            stream = [.. stream.AsSpan(0, at), .. body, .. stream.AsSpan(at + theirs.Length)];
        }
        using QemuProcess target = QemuProcess.WithMachine(version, s_machine, "-incoming", "defer");
        string file = target.File("in");
        File.WriteAllBytes(file, stream);
        target.Listen($"exec:cat {file}");
        Assert.That(target.WaitMigrated(), Is.EqualTo("completed"), () => target.Errors);
        byte[] again = Saved(target);
        foreach (string name in s_sections) Assert.That(Timeless(name, Body(again, Entry(again, name))), Is.EqualTo(Timeless(name, ours[name])), name);
    }

    /// <summary>A section without what the wall clock changes between two saves: the time of day, and when its timers are next due.</summary>
    private static byte[] Timeless(string name, byte[] body)
    {
        if (name != Rtc) return body;
        byte[] copy = [.. body];
        foreach (int index in (int[])[0, 2, 4, 6, 7, 8, 9, 0x32]) copy[index] = 0;
        copy.AsSpan(^16..).Clear();
        return copy;
    }

    private static byte[] Saved(QemuProcess qemu)
    {
        string file = qemu.File("out");
        qemu.Run("migrate", new JsonObject { ["uri"] = $"exec:cat > {file}" });
        Assert.That(qemu.WaitMigrated(), Is.EqualTo("completed"), () => qemu.Errors);
        return File.ReadAllBytes(file);
    }

    private static StreamEntry Entry(byte[] stream, string name) =>
        StreamViewer.Read(new MemoryFile(stream)).Entries.Single(e => e.Kind == StreamEntryKind.Full && e.Name == name && e.InstanceId == 0);

    /// <summary>Behind type, section id, name with its length, instance and version.</summary>
    private static int BodyOffset(StreamEntry entry) => (int)entry.Offset + 14 + entry.Name!.Length;

    private static byte[] Body(byte[] stream, StreamEntry entry) => stream[BodyOffset(entry)..(int)(entry.Offset + entry.Length - 5)];

    /// <summary>The devices of a VM with an accelerator, without one.</summary>
    private sealed class Pc : IDisposable
    {
        private readonly LegacyDevices _legacy;
        private readonly SerialDevice _serial;

        internal Pc()
        {
            Services.Memory.AddBlock(new Core.Memory.RamBlockOptions { Name = "ram", SizeBytes = SizeMiB << 20 });
            _legacy = new LegacyDevices(Services);
            _serial = new SerialDevice(DeviceOptions.Parse("serial"), Services);
        }

        internal TestServices Services { get; } = new();

        /// <summary>What firmware and drivers do to them, so that no section is as after power-on.</summary>
        internal void Use()
        {
            using Lock.Scope held = Services.Bql.Acquire();
            IoBus io = Services.Io;
            foreach ((int index, int value) in ((int, int)[])[(0x01, 0x11), (0x03, 0x22), (0x05, 0x13), (0x0a, 0x2a), (0x40, 0x5a), (0x7f, 0xa5)])
            {
                io.PioWrite(0x70, 1, (uint)index);
                io.PioWrite(0x71, 1, (uint)value);
            }
            io.PioWrite(0x64, 1, 0x60);
            io.PioWrite(0x60, 1, 0x65);
            io.PioWrite(0x64, 1, 0xaa); // Its answer 0x55 stays in the buffer.
            io.PioWrite(0xcf8, 4, 0x80000004);
            io.PioWrite(0xcfc, 2, 0x0103);
            io.PioWrite(0xcf8, 4, 0x8000003c);
            io.PioWrite(0xcfc, 1, 0x0b);
            ushort com1 = 0x3f8;
            foreach ((int register, int value) in ((int, int)[])[(3, 0x83), (0, 0x06), (1, 0x00), (3, 0x1b), (2, 0xc7), (4, 0x0b), (1, 0x05), (7, 0x77)])
                io.PioWrite((ushort)(com1 + register), 1, (uint)value);
        }

        public void Dispose()
        {
            _serial.Dispose();
            _legacy.Dispose();
            Services.Dispose();
        }
    }
}
