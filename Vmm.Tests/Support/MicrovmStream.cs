using System.Text;
using System.Text.Json.Nodes;
using Vmm.Core.SaveVm;
using Vmm.Migration.Viewer;

namespace Vmm.Tests.Support;

/// <summary>
/// A stream that QEMU's microvm saved. Of QEMU's machines, microvm has the devices of our KVM guests. Tests read sections and replace them
/// before another QEMU loads the stream.
/// </summary>
internal sealed class MicrovmStream
{
    internal const ulong MemoryBytes = 16 << 20;

    private byte[] _bytes;

    private MicrovmStream(byte[] bytes) => _bytes = bytes;

    /// <summary>Starts a stopped microvm.</summary>
    internal static QemuProcess Start(string version, params string[] extra) => QemuProcess.WithMachine(
        version, ["-M", "microvm,pcie=on,rtc=on,isa-serial=on,pit=on,pic=on", "-m", $"{MemoryBytes >> 20}", "-device", "i8042", "-serial", "null", "-S"], extra);

    internal static MicrovmStream Save(QemuProcess qemu)
    {
        string file = qemu.File("out");
        qemu.SaveByExec(file);
        return new MicrovmStream(File.ReadAllBytes(file));
    }

    internal void Load(QemuProcess qemu)
    {
        string file = qemu.File("in");
        File.WriteAllBytes(file, _bytes);
        qemu.Listen($"exec:cat {file}");
        Assert.That(qemu.WaitMigrated(), Is.EqualTo("completed"), () => qemu.Errors);
    }

    internal byte[] Body(string name, uint instance = 0)
    {
        StreamEntry entry = Entry(name, instance);
        return _bytes[BodyOffset(entry)..BodyEnd(entry)];
    }

    internal void Replace(string name, uint instance, byte[] body)
    {
        StreamEntry entry = Entry(name, instance);
        _bytes = [.. _bytes.AsSpan(0, BodyOffset(entry)), .. body, .. _bytes.AsSpan(BodyEnd(entry))];
    }

    /// <summary>Asserts that the stream's VMDESC describes a section with exactly our text.</summary>
    internal void AssertDescribes(SaveVmEntry entry)
    {
        string all = Encoding.ASCII.GetString(_bytes.AsSpan(_bytes.AsSpan().LastIndexOf("\"devices\": ["u8)));
        Assert.That(all, Does.Contain($"{{\"name\": \"{entry.IdStr}\", \"instance_id\": {entry.InstanceId}, {SectionBytes.Describe(entry.VmState!)[1..^1]}}}"), entry.ToString());
    }

    /// <summary>The body starts behind type, section id, name with its length, instance and version.</summary>
    private static int BodyOffset(StreamEntry entry) => (int)entry.Offset + 14 + entry.Name!.Length;

    /// <summary>The body ends before the footer.</summary>
    private static int BodyEnd(StreamEntry entry) => (int)(entry.Offset + entry.Length - 5);

    private StreamEntry Entry(string name, uint instance) =>
        StreamViewer.Read(new MemoryFile(_bytes)).Entries.Single(e => e.Kind == StreamEntryKind.Full && e.Name == name && e.InstanceId == instance);
}
