using System.Buffers.Binary;
using System.Text;
using Vmm.Core.SaveVm;
using Vmm.Core.Wire;

namespace Vmm.Tests.Support;

/// <summary>The two sections of QEMU's CPU object, which vmm lacks: a QEMU without one takes no writes to RAM from outside. Their bodies are skipped.</summary>
internal static class CpuSections
{
    /// <summary>Makes a VM accept the sections as they stand in a whole stream of that QEMU.</summary>
    internal static void Accept(TestVm vm, byte[] stream)
    {
        foreach ((string id, int version, int length) in Find(stream))
            vm.Vm.SaveVm.Register(new SaveVmRegistration { IdStr = id, InstanceId = 0, VersionId = version, MinimumVersionId = version }, SaveVmHandlers.Of(new Opaque(length)));
    }

    private static IEnumerable<(string Id, int Version, int Length)> Find(byte[] stream)
    {
        foreach (string id in (string[])["cpu_common", "cpu"])
        {
            byte[] header = [(byte)id.Length, .. Encoding.ASCII.GetBytes(id), 0, 0, 0, 0];
            int at = stream.AsSpan().IndexOf(header) + header.Length;
            int version = BinaryPrimitives.ReadInt32BigEndian(stream.AsSpan(at));
            uint sectionId = BinaryPrimitives.ReadUInt32BigEndian(stream.AsSpan(at - header.Length - 4));
            byte[] footer = [0x7e, (byte)(sectionId >> 24), (byte)(sectionId >> 16), (byte)(sectionId >> 8), (byte)sectionId, 4];
            yield return (id, version, stream.AsSpan(at + 4).IndexOf(footer));
        }
    }

    private sealed class Opaque(int length) : ILoadState
    {
        public void LoadState(QemuFileReader f, int versionId) => f.Skip(length);
    }
}
