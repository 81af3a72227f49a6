using Vmm.Core.Devices;
using Vmm.Core.Errors;
using Vmm.Core.SaveVm;
using Vmm.Tests.Property;
using Vmm.Tests.Support;

namespace Vmm.Tests.Fuzz;

/// <summary>Declared sections with any bytes: a load succeeds or fails with a <see cref="VmmException"/>, and loaded state can be saved.</summary>
[TestFixture]
public sealed class VmStateLoadFuzz
{
    /// <summary>Loads one input; its first byte selects the section and the version.</summary>
    public static void Fuzz(ReadOnlySpan<byte> input)
    {
        if (input.IsEmpty) return;
        using var services = new TestServices();
        IVmStateSection section;
        switch (input[0] & 3)
        {
            case 0: section = Section(new SerialDevice(DeviceOptions.Parse("serial"), services)); break;
            case 1: section = Section(new ScratchDevice(DeviceOptions.Parse("scratch"), services)); break;
            case 2: section = VmClock.Description.Bind(services.Clock); break;
            default:
                var made = new RandomVmState(input[0]);
                section = made.Description.Bind(made.NewOwner());
                break;
        }
        int version = Math.Max(section.MinimumVersionId, section.VersionId - (input[0] >> 6));
        try
        {
            SectionBytes.LoadFramed(section, input[1..], version);
        }
        catch (VmmException)
        {
            return;
        }
        SectionBytes.Save(section);

        IVmStateSection Section(IDisposable device)
        {
            IVmStateSection state = services.SaveVm.Entries().Single().VmState!;
            device.Dispose();
            return state;
        }
    }

    [Test]
    public void RandomBytesNeverEscape([Range(1, 20)] int seed)
    {
        var random = new Random(seed);
        for (int i = 0; i < 100; i++)
        {
            var bytes = new byte[random.Next(300)];
            random.NextBytes(bytes);
            Fuzz(bytes);
        }
    }

    [Test]
    public void DamagedBodiesNeverEscape([Range(1, 40)] int seed)
    {
        var random = new Random(seed);
        using var services = new TestServices();
        using var serial = new SerialDevice(DeviceOptions.Parse("serial"), services);
        serial.Port.WriteRegister(2, 0xc1);
        serial.Port.WriteRegister(1, 0x07);
        serial.Port.Receive("damaged"u8);
        var made = new RandomVmState(seed * 4 + 3);
        (byte, byte[])[] bodies =
        [
            (0, SectionBytes.Save(SerialDevice.Description, serial)), ((byte)(seed * 4 + 3), SectionBytes.Save(made.Description, made.NewOwner(seed))),
        ];
        foreach ((byte head, byte[] body) in bodies)
        {
            for (int i = 0; i < 100; i++)
            {
                byte[] input = [head, .. SectionBytes.Frame(body)];
                for (int n = random.Next(1, 4); n > 0; n--) input[random.Next(1, input.Length)] = random.Next(4) == 0 ? (byte)5 : (byte)random.Next(256);
                Fuzz(input);
            }
        }
    }
}
