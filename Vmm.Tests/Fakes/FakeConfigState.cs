using Vmm.Core.Wire;
using Vmm.Devices.Vfio.Migration;

namespace Vmm.Tests.Fakes;

/// <summary>A function's config record of fixed bytes: 276, the size that a device with 256 bytes of config space has.</summary>
internal sealed class FakeConfigState : IVfioConfigState
{
    public byte[] Bytes { get; set; } = new byte[276];

    public int Reapplied { get; private set; }

    public List<string> Trace { get; init; } = [];

    public void ReadShadow() => Trace.Add("ReadShadow");

    public int SignalsTaken { get; private set; }

    public void TakeSignals() => SignalsTaken++;

    public void SaveConfig(QemuFileWriter f)
    {
        Trace.Add("SaveConfig");
        f.Write(Bytes);
    }

    public void LoadConfig(QemuFileReader f, bool apply)
    {
        byte[] bytes = new byte[Bytes.Length];
        f.Read(bytes);
        if (bytes[0] != Bytes[0]) throw f.Bad("config", $"{Bytes[0]}", $"{bytes[0]}");
        if (apply) Bytes = bytes;
        Trace.Add(apply ? "LoadConfig" : "CheckConfig");
    }

    public void ReapplyAfterReset() => Reapplied++;
}
