using Vmm.Core.Devices;
using Vmm.Core.SaveVm;
using Vmm.Tests.Support;

namespace Vmm.Tests.Interop;

/// <summary>
/// A KVM guest of vmm has the devices of QEMU's microvm with a PCI bus. Body and VMDESC of each section load and save between vmm and a
/// running QEMU in both directions.
/// </summary>
[TestFixture, Category(QemuVersions.Category)]
public sealed class PcDeviceQemuTests
{
    private const string Rtc = "mc146818rtc", Keyboard = "pckbd", Host = "PCIHost", Bus = "PCIBUS", Bridge = "0000:00:00.0/gpex_root", Serial = "serial";

    private static readonly string[] s_sections = [Host, Bus, Bridge, Rtc, Keyboard, Serial];

    private static string[] Versions => QemuVersions.All;

    [TestCaseSource(nameof(Versions))]
    public void WhatQemuSavesIsLoadedAndSavedTheSame(string version)
    {
        using QemuProcess qemu = MicrovmStream.Start(version);
        MicrovmStream stream = MicrovmStream.Save(qemu);
        using var pc = new Pc();
        foreach (string name in s_sections)
        {
            SaveVmEntry entry = pc.Services.SaveVm.Find(name, 0)!;
            byte[] body = stream.Body(name);
            SectionBytes.Load(entry.VmState!, body, entry.VersionId);
            Assert.That(Timeless(name, SectionBytes.Save(entry.VmState!)), Is.EqualTo(Timeless(name, body)), name);
            stream.AssertDescribes(entry);
        }
    }

    [TestCaseSource(nameof(Versions))]
    public void WhatIsSavedHereQemuLoadsAndSavesTheSame(string version)
    {
        using QemuProcess source = MicrovmStream.Start(version);
        MicrovmStream stream = MicrovmStream.Save(source);
        using var pc = new Pc();
        pc.Use();
        var ours = new Dictionary<string, byte[]>();
        foreach (string name in s_sections)
        {
            ours[name] = SectionBytes.Save(pc.Services.SaveVm.Find(name, 0)!.VmState!);
            if (name != Bus) Assert.That(ours[name], Is.Not.EqualTo(stream.Body(name)), $"{name} still has its power-on state, so that this test would prove nothing");
            stream.Replace(name, 0, ours[name]);
        }
        using QemuProcess target = MicrovmStream.Start(version, "-incoming", "defer");
        stream.Load(target);
        MicrovmStream again = MicrovmStream.Save(target);
        foreach (string name in s_sections) Assert.That(Timeless(name, again.Body(name)), Is.EqualTo(Timeless(name, ours[name])), name);
    }

    /// <summary>A copy of a section without the fields that the wall clock changes between two saves: time of day and due times.</summary>
    private static byte[] Timeless(string name, byte[] body)
    {
        if (name != Rtc) return body;
        byte[] copy = [.. body];
        foreach (int index in (int[])[0, 2, 4, 6, 7, 8, 9, 0x32]) copy[index] = 0;
        copy.AsSpan(^16..).Clear();
        return copy;
    }

    /// <summary>The devices that a VM with an accelerator has, here without an accelerator.</summary>
    private sealed class Pc : IDisposable
    {
        private readonly LegacyDevices _legacy;
        private readonly SerialDevice _serial;

        internal Pc()
        {
            Services.Memory.AddBlock(new Core.Memory.RamBlockOptions { Name = "ram", SizeBytes = MicrovmStream.MemoryBytes });
            using Lock.Scope held = Services.Bql.Acquire();
            _legacy = new LegacyDevices(Services);
            _serial = new SerialDevice(DeviceOptions.Parse("serial"), Services);
        }

        internal TestServices Services { get; } = new();

        /// <summary>Programs the devices as firmware and drivers do, so that each section differs from its power-on state.</summary>
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
            io.PioWrite(0x64, 1, 0xaa); // The answer 0x55 of the self-test stays in the output buffer.
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
